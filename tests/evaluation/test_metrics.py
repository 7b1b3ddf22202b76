"""Metrics against the released evaluation code, in limiting cases and with increasing noise."""

import json
import os
from pathlib import Path

import pytest
import torch
from torchaudio.functional import lowpass_biquad

from moss_train.audio.io import read_audio
from moss_train.evaluation.metrics.base import Column, Pair, score_pair, split_available
from moss_train.evaluation.metrics.signal import PROFILES, Pesq, SiSdr, SpectralDistances, Stoi, signal_metrics

PAIRS = Path(__file__).parents[1] / "data" / "metrics"
EXPECTED = json.loads((PAIRS / "expected.json").read_text())["per_file"]
OFFICIAL = PROFILES["official"]
RATE = 24_000


@pytest.fixture(scope="module")
def sentence() -> torch.Tensor:
    """A real sentence [1, T] at 24 kHz."""
    path = PAIRS / "gt_audios" / "pocketsphinx_963e195ed800-identity.flac"
    return read_audio(path, sampling_rate=RATE, num_channels=1)[0]


def pair_of(name: str) -> Pair:
    reference, rate = read_audio(PAIRS / "gt_audios" / name)
    degraded, degraded_rate = read_audio(PAIRS / "syn_audios" / name)
    assert rate == degraded_rate
    return Pair(reference, degraded, rate)


def noisy(clip: torch.Tensor, snr_db: float, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    return clip + noise * clip.square().mean().sqrt() / noise.square().mean().sqrt() * 10 ** (-snr_db / 20)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_stoi_and_distances_are_those_of_the_released_code(name):
    pair = pair_of(name)
    values = Stoi().score(pair) | SpectralDistances(OFFICIAL).score(pair)
    expected = EXPECTED[name]
    assert values["stoi"] == pytest.approx(expected["stoi"], abs=1e-6)
    assert values["mel_loss"] == pytest.approx(expected["mel_loss"], abs=1e-5)
    assert values["stft_distance"] == pytest.approx(expected["stft"], abs=1e-5)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_pesq_is_that_of_the_released_code(name):
    if Pesq().missing():
        assert "CI" not in os.environ, "continuous integration has to compile PESQ: tools/setup_evaluation.sh"
        pytest.skip(str(Pesq().missing()))
    values = Pesq().score(pair_of(name))
    assert values["pesq_nb"] == pytest.approx(EXPECTED[name]["pesq_nb"], abs=5e-3)
    assert values["pesq_wb"] == pytest.approx(EXPECTED[name]["pesq_wb"], abs=5e-3)


def test_pesq_refuses_more_speech_than_its_program_has_room_for():
    """With 52 utterances the program reports 4.61 for a scale that ends at 4.55, with 60 it ends the process."""
    pytest.importorskip("pesq")
    generator = torch.Generator().manual_seed(0)
    bursts = 0.1 * torch.randn(52, 16_000, generator=generator)
    audio = torch.cat((bursts, torch.zeros_like(bursts)), dim=1).flatten()[None]
    scores = score_pair({"pesq": Pesq()}, Pair(audio, 0.9 * audio, 16_000))
    assert scores.values == {}
    assert scores.errors == {"pesq": "PESQ: longer than 40 seconds (cut with clip_seconds)"}


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_identity_gives_the_best_values(sentence, profile):
    metrics, _ = split_available(signal_metrics(profile))
    scores = score_pair(metrics, Pair(sentence, sentence, RATE))
    best = {"stoi": 1.0, "pesq_nb": 4.549, "pesq_wb": 4.644, "mel_loss": 0.0, "stft_distance": 0.0}
    for key, value in best.items():
        if key in scores.values:
            assert scores.values[key] == pytest.approx(value, abs=5e-4)
    assert scores.values["si_sdr"] > 100
    assert scores.errors == {}


def test_every_measure_gets_worse_with_the_noise(sentence):
    metrics, _ = split_available(signal_metrics(OFFICIAL))
    columns = [column for metric in metrics.values() for column in metric.columns]
    rows = [score_pair(metrics, Pair(sentence, noisy(sentence, snr), RATE)).values for snr in (30, 20, 10, 0)]
    for column in columns:
        values = [row[column.key] for row in rows]
        assert values == sorted(values, reverse=column.is_higher_better), column.title


ORDERS = {
    "stoi": ["low-pass", "30 dB", "20 dB", "10 dB", "0 dB"],
    "pesq_nb": ["low-pass", "30 dB", "20 dB", "10 dB", "0 dB"],
    "pesq_wb": ["low-pass", "30 dB", "20 dB", "10 dB", "0 dB"],
    "mel_loss": ["30 dB", "low-pass", "20 dB", "10 dB", "0 dB"],
    "stft_distance": ["30 dB", "low-pass", "20 dB", "10 dB", "0 dB"],
    "si_sdr": ["30 dB", "20 dB", "10 dB", "low-pass", "0 dB"],
}
"""Damages from the mildest to the worst, as each measure sees them on speech."""


def test_measures_order_damages_as_they_are_known_to():
    metrics, _ = split_available(signal_metrics(OFFICIAL))
    means: dict[str, dict[str, float]] = {key: {} for key in ORDERS}
    clips = [
        read_audio(path, sampling_rate=RATE, num_channels=1)[0]
        for path in sorted((PAIRS / "gt_audios").glob("pocketsphinx_*-bits6.flac"))
    ]
    for damage in ORDERS["stoi"]:
        rows = []
        for clip in clips:
            low_passed = lowpass_biquad(clip, RATE, 2000)
            damaged = low_passed if damage == "low-pass" else noisy(clip, float(damage.split()[0]))
            rows.append(score_pair(metrics, Pair(clip, damaged, RATE)).values)
        for key in rows[0]:
            means[key][damage] = sum(row[key] for row in rows) / len(rows)
    for key, values in means.items():
        is_higher_better = key not in ("mel_loss", "stft_distance")
        if values:
            assert sorted(values, key=values.__getitem__, reverse=is_higher_better) == ORDERS[key], key
    for damage, decibels in (("30 dB", 32.1), ("20 dB", 22.1), ("10 dB", 12.1), ("0 dB", 2.1)):
        assert means["si_sdr"][damage] == pytest.approx(decibels, abs=0.1)  # less of the noise is in the band of 16 kHz


def test_a_profile_is_its_rate_and_window(sentence):
    pair = Pair(sentence, noisy(sentence, 30), RATE)
    official, other = (SpectralDistances(PROFILES[name]).score(pair) for name in ("official", "dac24k"))
    assert other["mel_loss"] > 1.05 * official["mel_loss"]
    assert other["stft_distance"] > 1.05 * official["stft_distance"]
    assert "sqrt-Hann" in SpectralDistances(OFFICIAL).description


def test_only_the_profile_at_48_khz_hears_the_upper_octave():
    wide = torch.randn(1, 48_000, generator=torch.Generator().manual_seed(0)) * 0.1
    low = torch.fft.irfft(torch.fft.rfft(wide) * (torch.fft.rfftfreq(48_000, 1 / 48_000) < 12_500), n=48_000)
    heard = {name: SpectralDistances(PROFILES[name]).score(Pair(wide, low, 48_000))["mel_loss"] for name in PROFILES}
    assert heard["full48k"] > 1.0 > 0.1 > max(heard["dac24k"], heard["official"])


def test_half_the_level_is_a_constant_distance_by_hand():
    """White noise against half of it: log10(4) per scale, and half of the mean magnitude."""
    clip = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0))
    distance = SpectralDistances(OFFICIAL).score(Pair(clip, clip / 2, 16_000))["stft_distance"]
    magnitudes = 0.0
    for window in (2048, 512):
        spectrum = torch.stft(
            clip[0], window, window // 4, window=torch.hann_window(window).sqrt(), return_complex=True
        ).abs()
        magnitudes += spectrum.mean().item() / 2
    assert distance == pytest.approx(2 * torch.tensor(4.0).log10().item() + magnitudes, rel=1e-4)


def test_si_sdr_is_the_ratio_whatever_the_level():
    reference = torch.sin(torch.arange(16_000) * 0.05)[None]
    other = torch.cos(torch.arange(16_000) * 0.05)[None]
    value = SiSdr().score(Pair(reference, 3 * (reference + 0.1 * other), 16_000))["si_sdr"]
    assert value == pytest.approx(20, abs=0.05)


def silence(seconds: float) -> torch.Tensor:
    return torch.zeros(1, round(seconds * RATE))


@pytest.mark.parametrize("case", ["silent", "silent reference", "silent output", "short", "one sample", "empty", "nan"])
def test_clips_that_cannot_be_scored_are_errors_with_reasons_and_no_values_are_made_up(sentence, case):
    nan = sentence.clone()
    nan[0, 100] = torch.nan
    reference, degraded = {
        "silent": (silence(1), silence(1)),
        "silent reference": (silence(1), sentence[:, :RATE]),
        "silent output": (sentence, torch.zeros_like(sentence)),
        "short": (sentence[:, 9000:11_400], sentence[:, 9000:11_400]),
        "one sample": (sentence[:, :1], sentence[:, :1]),
        "empty": (sentence[:, :0], sentence[:, :0]),
        "nan": (sentence, nan),
    }[case]
    metrics, _ = split_available(signal_metrics(OFFICIAL))
    scores = score_pair(metrics, Pair(reference, degraded, RATE))
    assert all(torch.isfinite(torch.tensor(value)) for value in scores.values.values())
    measured = {name for name, metric in metrics.items() if metric.columns[0].key in scores.values}
    assert measured | scores.errors.keys() == metrics.keys()
    if case in ("silent", "silent reference", "short", "empty", "nan"):
        assert "stoi" in scores.errors
    if case == "nan":
        assert scores.values == {}
        assert scores.official == {"stoi": 0.0, "mel_loss": 0.0, "stft_distance": 0.0}
    if case == "short":
        assert scores.official["stoi"] == 1e-5


def test_measures_of_speech_are_not_computed_for_music(sentence):
    scores = score_pair(
        signal_metrics(OFFICIAL) | {"pesq": Stoi()}, Pair(sentence, sentence, RATE, {"domain": "music"})
    )
    assert set(scores.values) == {"mel_loss", "stft_distance", "si_sdr"}
    assert scores.errors == {}


def test_a_value_that_is_not_finite_is_an_error(sentence):
    class Broken:
        columns = (Column("broken", "Broken", True),)
        description = "broken"

        def missing(self):
            return None

        def score(self, pair):
            return {"broken": float("nan")}

    scores = score_pair({"broken": Broken()}, Pair(sentence, sentence, RATE))
    assert scores.values == {}
    assert scores.errors == {"broken": "broken is not finite"}


def test_scoring_leaves_the_number_of_threads_as_it_was(sentence):
    before = torch.get_num_threads()
    score_pair({"stoi": Stoi()}, Pair(sentence, sentence, RATE))
    assert torch.get_num_threads() == before


def test_the_shorter_of_two_lengths_counts(sentence):
    longer = torch.cat([sentence, noisy(sentence, 0)], dim=1)
    assert SpectralDistances(OFFICIAL).score(Pair(sentence, longer, RATE))["mel_loss"] < 0.01
