"""Pitch and patch-rate buzz on synthetic tones, whose values are known."""

import math
from pathlib import Path

import pytest
import torch

from moss_train.audio.io import read_audio
from moss_train.evaluation.metrics.base import MetricError, Pair, score_pair
from moss_train.evaluation.metrics.pitch import RATE, PatchRateBuzz, PitchAccuracy, patch_rate_level, track_pitch

PAIRS = Path(__file__).parents[1] / "data" / "metrics"


def tone(hertz: torch.Tensor | float, seconds: float = 1.0, harmonics: int = 8) -> torch.Tensor:
    """Return a tone [T] with harmonics that decrease by 6 dB per octave."""
    steps = torch.as_tensor(hertz, dtype=torch.float64).expand(round(seconds * RATE)) / RATE
    phase = 2 * math.pi * steps.cumsum(0)
    return sum(torch.sin(k * phase) / k for k in range(1, harmonics + 1)).float() * 0.1


def noise(seconds: float = 1.0) -> torch.Tensor:
    return 0.1 * torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(0))


def pitch(reference: torch.Tensor, degraded: torch.Tensor) -> float:
    return PitchAccuracy().score(Pair(reference[None], degraded[None], RATE))["pitch"]


def buzz(reference: torch.Tensor, degraded: torch.Tensor) -> float:
    return PatchRateBuzz().score(Pair(reference[None], degraded[None], RATE))["buzz"]


@pytest.mark.parametrize("hertz", [70.0, 100.0, 187.3, 240.0, 333.3, 470.0])
def test_the_pitch_of_a_tone_is_its_own_not_an_octave(hertz):
    found, is_voiced = track_pitch(tone(hertz))
    assert is_voiced.all()
    assert found.numpy() == pytest.approx(hertz, rel=0.005)


def test_a_tone_without_its_fundamental_keeps_its_pitch():
    whole, phase = tone(200.0), 2 * math.pi * 200 / RATE * torch.arange(1, RATE + 1, dtype=torch.float64)
    assert track_pitch(whole - 0.1 * torch.sin(phase).float())[0].numpy() == pytest.approx(200, rel=0.005)


def test_a_glide_is_followed():
    glide = torch.linspace(150, 250, RATE, dtype=torch.float64)
    hertz, _ = track_pitch(tone(glide))
    middles = (torch.arange(len(hertz)) * 160 + 240 + 40).clamp(max=RATE - 1)  # of the compared samples, roughly
    assert (hertz / glide[middles] - 1).abs().max() < 0.02


def test_noise_silence_and_what_is_too_quiet_are_not_voiced():
    assert track_pitch(noise())[1].double().mean() < 0.02
    assert not track_pitch(torch.zeros(RATE))[1].any()
    both = torch.cat((tone(200.0), 0.01 * tone(200.0)))
    assert track_pitch(both)[1][: RATE // 160 - 5].all()
    assert not track_pitch(both)[1][RATE // 160 + 1 :].any()


def test_accuracy_is_the_share_of_frames_within_five_per_cent():
    reference = tone(200.0, 2.0)
    assert pitch(reference, reference) == 1.0
    assert pitch(reference, 3 * tone(208.0, 2.0)) == 1.0
    assert pitch(reference, tone(212.0, 2.0)) == 0.0
    assert pitch(reference, tone(100.0, 2.0)) == 0.0
    assert pitch(reference, noise(2.0)) < 0.1
    half = torch.cat((tone(200.0), tone(150.0)))
    assert pitch(reference, half) == pytest.approx(0.5, abs=0.03)


def test_frames_without_voice_in_the_reference_do_not_count():
    reference = torch.cat((tone(200.0), torch.zeros(RATE)))
    assert pitch(reference, torch.cat((tone(200.0), noise()))) > 0.95


def test_a_patch_that_is_repeated_buzzes():
    patch = noise()[: RATE // 100]
    repeated = patch.repeat(100)
    assert patch_rate_level(repeated, 100.0) > 40
    assert abs(patch_rate_level(noise(), 100.0)) < 1.5
    assert buzz(noise(), repeated) > 40
    assert buzz(noise(), noise()) == 0.0
    quiet = noise() + repeated * 10 ** (-20 / 20)
    louder = noise() + repeated
    assert 0 < buzz(noise(), quiet) < buzz(noise(), louder) < buzz(noise(), repeated)


def test_a_voice_at_the_patch_rate_is_no_buzz_of_the_codec():
    voice = tone(100.0, harmonics=40)
    assert patch_rate_level(voice, 100.0) > 20
    assert buzz(voice, 0.5 * voice) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("metric", [PitchAccuracy(), PatchRateBuzz()], ids=["pitch", "buzz"])
def test_what_cannot_be_scored_is_an_error(metric):
    for audio in (torch.zeros(1, RATE), tone(200.0)[None, :100]):
        with pytest.raises(MetricError):
            metric.score(Pair(audio, audio, RATE))


def test_speech_with_itself_with_noise_and_with_another_clip():
    paths = sorted((PAIRS / "gt_audios").glob("pocketsphinx_*-bits6.flac"))
    clip, other = (read_audio(path, sampling_rate=RATE, num_channels=1)[0][0] for path in paths[:2])
    length = min(len(clip), len(other))
    damaged = clip + 0.03 * clip.square().mean().sqrt() * torch.randn(
        clip.shape, generator=torch.Generator().manual_seed(0)
    )
    assert pitch(clip, clip) == 1.0
    assert pitch(clip, damaged) > 0.95
    assert pitch(clip[:length], other[:length]) < 0.6
    voiced = track_pitch(clip)[1].double().mean()
    assert 0.15 < voiced < 0.8


def test_pitch_is_of_speech_buzz_of_everything():
    pair = Pair(tone(200.0)[None], tone(200.0)[None], RATE, {"domain": "music"})
    scores = score_pair({"pitch": PitchAccuracy(), "buzz": PatchRateBuzz()}, pair)
    assert scores.values == {"buzz": 0.0}
