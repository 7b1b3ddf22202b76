import copy
import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from moss_train.audio.io import read_audio, write_audio
from moss_train.inference.batching import choose_device, group_by_length, read_ahead
from moss_train.inference.decode import Decoder, decode_files
from moss_train.inference.encode import Encoder, encode_files
from moss_train.inference.files import (
    CODES_FORMATS,
    CodesInfo,
    find_audio,
    find_codes,
    read_codes,
    read_codes_header,
    targets_of,
    write_codes,
)
from moss_train.model import MossAudioTokenizerConfig, MossAudioTokenizerModel
from moss_train.utils.errors import UserError

RECORDINGS = Path(__file__).parents[2] / "recipes/quickstart/audio"
INFO = CodesInfo(model="m", sampling_rate=24000, frame_rate=25.0, num_channels=1, num_samples=2000, fingerprint="f")


@pytest.fixture(scope="module")
def model() -> MossAudioTokenizerModel:
    torch.manual_seed(0)
    stages = [
        {"patch_size": 240, "output_dimension": 24, "d_model": 32, "num_heads": 2, "num_layers": 1},
        {"patch_size": 4, "output_dimension": 32, "d_model": 32, "num_heads": 2, "num_layers": 1},
    ]
    quantizer = {"rvq_dim": 16, "num_quantizers": 4, "codebook_size": 32, "codebook_dim": 4}
    config = MossAudioTokenizerConfig.from_stages(24000, stages, quantizer, context_seconds=2.0)
    return MossAudioTokenizerModel(config).eval()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Five real recordings of different lengths in folders, one of them stereo at another rate."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted((RECORDINGS / "sound").glob("*.flac"))[:4]
    for number, source in enumerate(sources):
        audio, rate = read_audio(source)
        (folder / "sound").mkdir(exist_ok=True)
        write_audio(folder / "sound" / f"clip{number}.wav", audio[:, : 20000 + 7001 * number], rate)
    audio, rate = read_audio(sorted((RECORDINGS / "speech").rglob("*.flac"))[0])
    write_audio(folder / "speech one.flac", audio[:, :30001].repeat(2, 1), 44100)
    return folder


def encode(model, source, out, batch_seconds=10.0, **options):
    return encode_files(Encoder(model, "tiny", **options), find_audio([str(source)], out)[0], batch_seconds)


def test_batched_codes_equal_those_of_single_clips(model, corpus, tmp_path):
    together = encode(model, corpus, tmp_path / "together")
    alone = encode(model, corpus, tmp_path / "alone", batch_seconds=0.001)
    assert (together.num_written, alone.num_written) == (5, 5)
    files = sorted((tmp_path / "alone").rglob("*.safetensors"))
    names = [file.relative_to(tmp_path / "alone").as_posix() for file in files]
    assert names == [f"sound/clip{number}.safetensors" for number in range(4)] + ["speech one.safetensors"]
    for file, name in zip(files, names, strict=True):
        codes, info = read_codes(file)
        other, _ = read_codes(tmp_path / "together" / name)
        assert torch.equal(codes, other)
        assert codes.shape == (4, -(-info.num_samples // 960))


def test_files_equal_what_the_model_says(model, corpus, tmp_path):
    encode(model, corpus, tmp_path)
    audio, _ = read_audio(corpus / "speech one.flac", sampling_rate=24000, num_channels=1)
    codes, info = read_codes(tmp_path / "speech one.safetensors")
    assert torch.equal(codes, model.encode(audio[None], return_dict=True).audio_codes[:, 0])
    assert info == CodesInfo("tiny", 24000, 25.0, 1, audio.shape[1], Encoder(model, "other").fingerprint)
    assert read_codes_header(tmp_path / "speech one.safetensors") == (tuple(codes.shape), info)


@pytest.mark.parametrize("options", [{"chunk_duration": 0.16}, {"num_quantizers": 2}, {"batch_invariant": True}])
def test_options_reach_the_model(model, corpus, tmp_path, options):
    encode(model, corpus / "speech one.flac", tmp_path / "plain")
    encode(model, corpus / "speech one.flac", tmp_path / "other", **options)
    plain, _ = read_codes(tmp_path / "plain/speech one.safetensors")
    other, _ = read_codes(tmp_path / "other/speech one.safetensors")
    assert torch.equal(plain[: options.get("num_quantizers", 4)], other)


def test_decoded_audio_has_the_original_length_and_the_models_samples(model, corpus, tmp_path):
    encode(model, corpus, tmp_path / "codes")
    works = find_codes([str(tmp_path / "codes")], tmp_path / "audio", ".flac")
    report = decode_files(Decoder(model), works, batch_seconds=10.0)
    assert (report.num_written, report.num_present, report.failures) == (5, 0, [])
    codes, info = read_codes(tmp_path / "codes/sound/clip2.safetensors")
    audio, rate = read_audio(tmp_path / "audio/sound/clip2.flac")
    wanted = model.decode(codes, return_dict=True).audio[0, :, : info.num_samples].clamp(-1, 1)
    assert (rate, audio.shape) == (24000, (1, 34002))
    assert (audio - wanted).abs().max() < 2 / 32768


def test_corrupt_files_are_reported_and_passed_over(model, corpus, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "noise.wav").write_bytes(b"this is not audio")
    whole = (corpus / "sound/clip0.wav").read_bytes()
    (source / "cut.flac").write_bytes((corpus / "speech one.flac").read_bytes()[:9000])
    (source / "good.wav").write_bytes(whole)
    report = encode(model, source, tmp_path / "out")
    assert report.num_written == 1
    assert sorted(path.name for path, _ in report.failures) == ["cut.flac", "noise.wav"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["good.safetensors"]


def test_a_second_run_writes_nothing_and_other_options_are_refused(model, corpus, tmp_path):
    encode(model, corpus, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    (tmp_path / "sound/clip3.safetensors").unlink()
    again = encode(model, corpus, tmp_path)
    assert (again.num_written, again.num_present) == (1, 4)
    kept = {file: file.stat().st_mtime_ns for file in before if file.name != "clip3.safetensors"}
    assert kept.items() <= before.items()
    with pytest.raises(UserError, match=r"has 4 levels, not 2; choose another out="):
        encode(model, corpus, tmp_path, num_quantizers=2)


def test_codes_of_other_weights_are_never_mixed(model, corpus, tmp_path):
    encode(model, corpus / "sound", tmp_path)
    trained = copy.deepcopy(model)
    trained.decoder.apply(lambda part: [weight.data.mul_(1.01) for weight in part.parameters(recurse=False)])
    assert encode(trained, corpus / "sound", tmp_path).num_present == 4
    trained.encoder[1].input_proj.weight.data[0, 0] += 1e-4
    with pytest.raises(UserError, match=r"made with other weights or another level \(model=tiny\)"):
        encode(trained, corpus / "sound", tmp_path)


def test_options_are_checked_before_any_file_is_read(model):
    with pytest.raises(UserError, match="num_quantizers must be between 1 and 4, got 5"):
        Encoder(model, "tiny", num_quantizers=5)
    with pytest.raises(UserError, match="chunk_duration must be a whole number of frames"):
        Decoder(model, chunk_duration=0.05)


def test_codes_of_another_model_are_reported(model, tmp_path):
    write_codes(tmp_path / "rate.safetensors", torch.zeros(4, 3), CodesInfo("m", 16000, 25.0, 1, 2000, "f"))
    write_codes(tmp_path / "range.safetensors", torch.full((4, 3), 99), INFO)
    write_codes(tmp_path / "frames.safetensors", torch.zeros(4, 9), INFO)
    (tmp_path / "broken.safetensors").write_bytes(b"12345")
    (tmp_path / "cut.npz").write_bytes(b"PK12345")
    np.savez(tmp_path / "foreign.npz", codes=np.zeros((4, 3), dtype=np.int16))
    np.savez(tmp_path / "empty.npz", other=np.zeros(3))
    np.savez(tmp_path / "float.npz", codes=np.zeros((4, 3)))
    report = decode_files(Decoder(model), find_codes([str(tmp_path)], tmp_path / "out", ".wav"), 10.0)
    reasons = {path.stem: reason for path, reason in report.failures}
    assert report.num_written == 0
    assert "16000 Hz" in reasons["rate"]
    assert "0..31" in reasons["range"]
    assert "9 frames" in reasons["frames"]
    assert "not a readable codes file" in reasons["broken"]
    assert "not a readable codes file" in reasons["cut"]
    assert "lacks the metadata of a codes file ('model')" in reasons["foreign"]
    assert "an npz file without codes" in reasons["empty"]
    assert "codes of type float64" in reasons["float"]


def test_an_archive_that_unfolds_without_end_is_refused(tmp_path, monkeypatch):
    """The limit applies to the bytes that are read, whatever the headers say; other arrays are not read."""
    monkeypatch.setattr("moss_train.inference.files.MAX_EXPANDED_BYTES", 2**20)
    zeros = np.zeros((2, 2**20), np.int16)
    np.savez_compressed(tmp_path / "bomb.npz", codes=zeros, **asdict(INFO))
    np.savez_compressed(tmp_path / "beside.npz", codes=zeros[:, :9], **asdict(INFO), other=zeros)
    np.savez(tmp_path / "stored.npz", codes=zeros, **asdict(INFO))
    assert (tmp_path / "bomb.npz").stat().st_size < 2**14
    with pytest.raises(UserError, match="unfolds to more than 1048576 bytes"):
        read_codes(tmp_path / "bomb.npz")
    assert read_codes(tmp_path / "beside.npz")[0].shape == (2, 9)
    assert read_codes(tmp_path / "stored.npz")[0].shape == (2, 2**20)  # its size is that of the file


@pytest.mark.parametrize("shape", ["(2, 1000000000000000)", "(2, -1)", "(99999999999999999999,)"])
def test_a_header_that_promises_too_much_is_refused(tmp_path, shape):
    header = f"{{'descr': '<i2', 'fortran_order': False, 'shape': {shape}}}".encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("codes.npy", content)
    with pytest.raises(UserError, match="is not a readable codes file"):
        read_codes(tmp_path / "x.npz")


@pytest.mark.parametrize(("largest", "dtype"), [(1023, torch.int16), (40000, torch.int64)])
@pytest.mark.parametrize("suffix", CODES_FORMATS)
def test_codes_round_trip(tmp_path, suffix, largest, dtype):
    codes, path = torch.tensor([[0, 5, largest], [1, 2, 3]]), tmp_path / f"deep/clip.{suffix}"
    write_codes(path, codes, INFO)
    read, info = read_codes(path)
    assert torch.equal(read, codes)
    assert info == INFO
    assert read_codes_header(path) == ((2, 3), INFO)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if suffix == "npz":
        assert np.load(path)["codes"].dtype == {torch.int16: np.int16, torch.int64: np.int64}[dtype]
    else:
        assert path.stat().st_size < 300 + 6 * dtype.itemsize


def test_groups_hold_similar_lengths_within_the_limit():
    lengths = [1.0, 9.0, 8.0, 0.9, 30.0, 2.0, 7.0]
    groups = group_by_length(lengths, lengths, limit=20.0)
    assert groups == [[30.0], [9.0, 8.0], [7.0], [2.0], [1.0, 0.9]]


def test_read_ahead_keeps_order_and_errors():
    def read(value: int) -> int:
        if value == 3:
            raise UserError("three")
        return value * 10

    first, second = read_ahead([[1, 2], [3, 4]], read)
    assert first == [(1, 10), (2, 20)]
    assert isinstance(second[0][1], UserError)
    assert second[1] == (4, 40)


def test_manifest_ids_name_the_codes(corpus, tmp_path):
    lines = [{"path": "sound/clip0.wav", "id": "a/first"}, {"path": str(corpus / "sound/clip1.wav"), "id": "../../b.x"}]
    (corpus / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    works = find_audio([str(corpus / "clips.jsonl")], tmp_path)[0]
    assert [work.target for work in works] == [tmp_path / "a/first.safetensors", tmp_path / "b.x.safetensors"]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("a/b.wav", "a/b.out"),
        ("/abs/b.flac", "abs/b.out"),
        ("../x.wav", "x.out"),
        ("v1.2 take", "v1.2 take.out"),
        ("noise", "noise.out"),
        (".wav", ".wav.out"),
    ],
)
def test_targets_stay_below_the_output_folder(name, target):
    assert targets_of([name], ".out")[0].as_posix() == target


def test_two_files_with_one_target_are_refused(corpus, tmp_path):
    clip = corpus / "sound/clip0.wav"
    with pytest.raises(UserError, match="would both become"):
        find_audio([str(clip), str(clip)], tmp_path)


@pytest.mark.parametrize(
    "find", [lambda path: find_audio([path], Path("o")), lambda path: find_codes([path], Path("o"), ".wav")]
)
def test_nothing_found_is_an_error(find, tmp_path):
    with pytest.raises(UserError, match="has no"):
        find(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        find(str(tmp_path / "nowhere"))


def test_choose_device():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device=gpu is not a device"):
        choose_device("gpu")
    with pytest.raises(UserError, match=r"device=cuda:99 is not there"):
        choose_device("cuda:99")
    for name in ("mps", "xpu", "meta"):  # devices to torch, which then cannot use them
        with pytest.raises(UserError, match=f"device={name} is not supported"):
            choose_device(name)
