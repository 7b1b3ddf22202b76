"""Clips at the decoder's rate: the encoder's input is bit-identical to what `encode` computes from the same clip."""

from pathlib import Path

import pytest
import torch

from moss_train.audio.io import audio_info, read_audio, write_audio
from moss_train.cli.main import main
from moss_train.commands import pack as pack_command
from moss_train.data.shards.codes import CodeShards
from moss_train.data.stream.loader import make_loader, prefetch_within
from moss_train.data.stream.stream import AudioStream, ClipFormat
from moss_train.export.load import load_tokenizer
from moss_train.inference.encode import Encoder
from moss_train.inference.files import Work, read_codes
from moss_train.model.configuration_moss_audio_tokenizer import output_ratio
from moss_train.utils.errors import UserError
from tests.data.packed_clips import iterate_clips
from tests.model.small_models import save_one_stage_model

HIGH = ClipFormat(24000, 1, 1920, output_sampling_rate=48000)
CAT_MINI = Path(__file__).parents[2] / "recipes" / "cat_mini"


@pytest.fixture(scope="module")
def high(tmp_path_factory, recordings, pack_config) -> Path:
    """Pack speech with noise up to 24 kHz at 48 kHz, of even and odd lengths."""
    folder = tmp_path_factory.mktemp("high")
    (folder / "audio").mkdir()
    for number, path in enumerate(sorted((recordings / "speech").rglob("*.flac"))[:4]):
        audio = read_audio(path, sampling_rate=48000, num_channels=1)[0][:, : 60_000 + 1001 * number]
        audio += 0.01 * torch.randn(audio.shape, generator=torch.Generator().manual_seed(number))
        write_audio(folder / "audio" / f"{number}.flac", audio, 48000)
    config = pack_config(input=folder / "audio", out=folder / "packed", sampling_rate=48000)
    assert pack_command.run(config) == 0
    return folder


def batches(high: Path, crop_seconds: float, **options):
    stream = AudioStream([high / "packed"], HIGH, crop_seconds=crop_seconds, max_seconds=5.0)
    loader = make_loader(stream, text_encoder=None, position=0, updates=[(0, 4.0)], micro_batch_seconds=4.0, **options)
    return [batch for update in loader for batch in update.micro_batches]


@pytest.mark.parametrize("crop_seconds", [5.0, 0.301], ids=["whole", "cropped"])
def test_the_encoder_gets_the_bits_of_encode(high, tmp_path, crop_seconds):
    encoder = Encoder(load_tokenizer(CAT_MINI), "cat_mini")
    stored = {name: audio for name, audio, _ in iterate_clips([high / "packed"], sampling_rate=48000, num_channels=1)}
    seen = 0
    for batch in batches(high, crop_seconds):
        assert batch.reference is batch.target
        assert batch.target.shape[2] == 2 * batch.audio.shape[2]
        assert batch.audio.shape[2] % 1920 == 0
        for item, name in enumerate(batch.sample_ids):
            clip = batch.target[item, :, : batch.target_lengths[item]]
            write_audio(tmp_path / "clip.wav", clip, 48000)
            wanted = encoder.read(Work(tmp_path / "clip.wav", tmp_path / "codes"))
            assert torch.equal(batch.audio[item, :, : batch.audio_lengths[item]], wanted)
            assert not batch.audio[item, :, batch.audio_lengths[item] :].any()
            assert not batch.target[item, :, batch.target_lengths[item] :].any()
            assert -(-clip.shape[1] // 2) == wanted.shape[1]
            places = stored[name][0].unfold(0, clip.shape[1], 1)
            assert (places == clip).all(dim=1).any()  # somewhere in the recording
            seen += 1
    assert seen >= 4


def test_whole_clips_have_the_codes_of_the_recorded_files(high):
    model = load_tokenizer(CAT_MINI)
    encoder, found = Encoder(model, "cat_mini", batch_invariant=True), {}
    for batch in batches(high, 5.0):
        for item, name in enumerate(batch.sample_ids):
            clip = batch.audio[item, :, : batch.audio_lengths[item]]
            found[name] = model.encode(clip[None], batch_invariant=True).audio_codes[:, 0]
    assert len(found) == 4
    for name, codes in found.items():
        path = high / "audio" / (name if name.endswith(".flac") else f"{name}.flac")
        assert torch.equal(codes, encoder.codes([encoder.read(Work(path, path))])[0])


def test_a_batch_travels_between_processes_with_its_target(high):
    for ours, theirs in zip(batches(high, 0.5), batches(high, 0.5, num_workers=1), strict=True):
        assert torch.equal(ours.target, theirs.target)
        assert torch.equal(ours.target_lengths, theirs.target_lengths)
        moved = ours.to("cpu")
        assert torch.equal(moved.reference, ours.target)
        assert torch.equal(moved.reference_lengths, ours.target_lengths)


def test_what_cannot_be_read_at_two_rates_is_refused(high, packed):
    with pytest.raises(UserError, match="sampling_rate=24000 num_channels=1, the model needs sampling_rate=48000"):
        AudioStream([packed], HIGH, crop_seconds=1.0)
    with pytest.raises(ValueError, match="output_sampling_rate=36000 is not a multiple of sampling_rate=24000"):
        output_ratio(24000, 36000)


def test_workers_keep_both_rates_within_their_memory():
    one, two = (prefetch_within(ClipFormat(24000, 1, 1920, output_sampling_rate=r), 30_000, 8) for r in (None, 48000))
    assert one[0] * one[1] >= 2 * two[0] * two[1] > 0


def test_a_packed_corpus_at_the_higher_rate_has_the_codes_of_its_files(high, tmp_path):
    """With a model that has such a decoder; its codes also decode to the lengths of the files."""
    save_one_stage_model(tmp_path / "model", output_sampling_rate=48000)
    common = [f"model={tmp_path / 'model'}", "device=cpu", "batch_invariant=true"]
    assert main(["encode", *common, f"input={high / 'audio'}", f"out={tmp_path / 'files'}"]) == 0
    assert main(["encode", *common, f"shards={high / 'packed'}", f"out={tmp_path / 'shards'}"]) == 0
    shards = CodeShards(tmp_path / "shards")
    assert (len(shards), shards.source.sampling_rate) == (4, 24000)
    decoded = [f"input={tmp_path / 'shards'}", f"out={tmp_path / 'audio'}", "format=flac"]
    assert main(["decode", *common, *decoded]) == 0
    for name, codes, labels in shards:
        expected, info = read_codes((tmp_path / "files" / name).with_suffix(".safetensors"))
        assert torch.equal(codes, expected)
        assert len(codes.unique()) > 4
        assert (labels["num_samples"], labels["sampling_rate"]) == (info.num_samples, 24000)
        original = audio_info((high / "audio" / name).with_suffix(".flac"))
        restored = audio_info((tmp_path / "audio" / name).with_suffix(".flac"))
        assert restored.sampling_rate == original.sampling_rate == 48000
        assert restored.num_samples - original.num_samples in (0, 1)


def test_a_packed_corpus_at_another_rate_is_refused(high, tmp_path, capsys):
    folder = tmp_path / "model"
    save_one_stage_model(folder, sampling_rate=32000)
    assert main(["encode", f"model={folder}", f"shards={high / 'packed'}", f"out={tmp_path / 'codes'}"]) == 2
    assert "have 48000 Hz and 1 channels, the model takes 32000 Hz (or a multiple)" in capsys.readouterr().err
