"""The committed trained model: it loads, matches its card, and streaming equals offline."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moss_train.audio.io import read_audio, write_audio
from moss_train.config.build import allow_package
from moss_train.discriminators import DiscriminatorSet, MultiPeriodDiscriminator
from moss_train.evaluation.metrics.base import Pair
from moss_train.evaluation.metrics.registry import build_metrics
from moss_train.losses.reconstruction import multi_scale_mel_distance
from moss_train.model import MossAudioTokenizerModel
from moss_train.training.step.objective import Objective
from recipes.cat_mini import discriminate
from tools.short_runs import depth_report

RECIPES = Path(__file__).parents[1] / "recipes"
FOLDER = RECIPES / "cat_mini"
AUDIO = RECIPES / "quickstart" / "audio"
PEAK = 0.7  # the peak level that it was trained at


@pytest.fixture(scope="module")
def model():
    return MossAudioTokenizerModel.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def speech():
    """Return the held-out sentences [1, T]."""
    entries = [json.loads(line) for line in (AUDIO / "heldout.jsonl").read_text().splitlines()]
    paths = [AUDIO / entry["path"] for entry in entries if entry["path"].startswith("speech")]
    clips = [read_audio(path, sampling_rate=24000, num_channels=1)[0] for path in paths]
    return [clip * (PEAK / clip.abs().max()) for clip in clips]


def test_half_precision_file_loads_as_float32(model):
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (FOLDER / "model.safetensors").stat().st_size < 16 * 2**20
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_440_128


def test_distances_of_held_out_speech_are_those_of_the_card(model, speech):
    report = depth_report(model, speech, [1, 4, 16])
    assert len(speech) == 3
    assert report.distances[1] == pytest.approx(2.418, abs=0.02)
    assert report.distances[4] == pytest.approx(2.157, abs=0.02)
    assert report.distances[16] == pytest.approx(1.943, abs=0.02)
    silence = [multi_scale_mel_distance(x[None], x[None] * 0, torch.tensor([x.shape[1]]), 24000).item() for x in speech]
    assert report.distances[16] < 0.4 * sum(silence) / len(silence)


def test_streaming_gives_the_offline_codes_and_audio(model, speech):
    audio = speech[0][None]
    codes = model.encode(audio, return_dict=True).audio_codes
    streamed = model.encode(audio, return_dict=True, chunk_duration=0.08).audio_codes
    assert torch.equal(streamed, codes)
    whole = model.decode(codes, return_dict=True).audio
    in_chunks = model.decode(codes, return_dict=True, chunk_duration=0.08).audio
    torch.testing.assert_close(in_chunks, whole, atol=1e-4 * whole.abs().max().item(), rtol=0)
    assert whole.abs().max() > 0.1  # audible


def test_what_there_is_to_hear_is_small_and_as_long_as_the_text_says():
    files = sorted((FOLDER / "listen").iterdir())
    assert sum(file.stat().st_size for file in files) < 1.5e6
    players = [file for file in files if file.suffix == ".opus"]
    assert len(players) == 18
    for file in players:
        audio, rate = read_audio(file)
        assert rate == 24000
        assert 1.5 < audio.shape[1] / rate < 6
        assert audio.square().mean().sqrt() > 0.01


def test_notices_of_the_recordings_lie_beside_the_weights():
    notice = (FOLDER / "NOTICE").read_text()
    assert "CC0 1.0" in notice
    assert all(voice in notice for voice in ("kathleen", "kerstin", "nathalie"))


def test_speaker_similarity_is_a_metric_of_a_package_beside_the_model(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    allow_package("speaker_similarity")
    (metric,) = build_metrics([{"_target_": "speaker_similarity.SpeakerSimilarity"}], "metrics").values()
    assert [column.key for column in metric.columns] == ["speaker_similarity"]
    if find_spec("resemblyzer") is None:
        assert "pip install resemblyzer" in metric.missing()
    else:
        audio = torch.randn(32000, generator=torch.Generator().manual_seed(0)) * 0.1
        assert metric.score(Pair(audio, audio, 16000, {}))["speaker_similarity"] == pytest.approx(1, abs=1e-5)


class Quieter:
    """Returns half the amplitude of a clip as its reconstruction."""

    sampling_rate = 24_000

    def encode(self, audio, num_quantizers, return_dict):
        return SimpleNamespace(audio_codes=audio)

    def decode(self, codes, return_dict):
        return SimpleNamespace(audio=0.5 * codes)


def test_discriminators_are_measured_on_lists_of_a_few_clips_too(tmp_path):
    noise = torch.randn(2, 24_000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 4
    for number, samples in enumerate(noise):
        write_audio(tmp_path / f"{number}.flac", samples[None], 24_000)
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(json.dumps({"path": f"{number}.flac"}) + "\n" for number in range(2)))
    pairs = discriminate.make_pairs(Quieter(), manifest, 240)
    assert len(pairs) == 2
    assert all(torch.equal(restored, 0.5 * audio) for audio, restored in pairs)
    objective = Objective(24_000, discriminator_crop_seconds=0.05)
    discriminators = DiscriminatorSet([MultiPeriodDiscriminator(periods=(2,), channels=(2, 2))])
    scores = discriminate.learn(discriminators, objective, pairs, pairs, updates=3)
    assert [update for update, *_ in scores] == [0, 3]
