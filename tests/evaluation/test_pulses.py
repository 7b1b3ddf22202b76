"""Pulses of the voice on synthetic sounds, whose values are known."""

import math

import pytest
import torch

from moss_train.evaluation.metrics.base import MetricError, Pair
from moss_train.evaluation.metrics.pitch import RATE, VoicePulses

TIME = torch.arange(RATE, dtype=torch.float64) / RATE


def modulated(depth: float, hertz: float = 200.0, carrier: float = 4000.0) -> torch.Tensor:
    """Return a second of a tone whose envelope is 1 + depth * cos."""
    envelope = 1 + depth * torch.cos(2 * math.pi * hertz * TIME)
    return (0.1 * envelope * torch.cos(2 * math.pi * carrier * TIME)).float()


def pulses(reference: torch.Tensor, degraded: torch.Tensor) -> float:
    return VoicePulses().score(Pair(reference[None], degraded[None], RATE))["pulses"]


def test_half_the_depth_of_modulation_is_minus_6_db_at_any_level():
    assert pulses(modulated(0.8), modulated(0.8)) == pytest.approx(0, abs=1e-6)
    assert pulses(modulated(0.8), 0.3 * modulated(0.4)) == pytest.approx(20 * math.log10(0.5), abs=0.01)


def test_only_rates_and_frequencies_of_the_voice_count():
    voice = modulated(0.8)
    assert pulses(voice, modulated(0.8, hertz=30.0)) < -40
    assert pulses(voice, modulated(0.8, hertz=600.0)) < -40
    assert pulses(voice, voice + modulated(0.8, hertz=300.0, carrier=1000.0)) == pytest.approx(0, abs=0.01)


def test_noise_in_place_of_a_pulse_train_has_lost_its_pulses():
    train = torch.zeros(RATE)
    train[::80] = 0.5  # 200 Hz
    noise = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    assert -16 < pulses(train, noise) < -8


@pytest.mark.parametrize("hertz", [None, 500.0])
def test_a_reconstruction_without_sound_in_the_band_has_no_value(hertz):
    degraded = torch.zeros(RATE) if hertz is None else modulated(0.8, carrier=hertz)
    with pytest.raises(MetricError, match="reconstruction is silent from 2000 to 6000 Hz"):
        pulses(modulated(0.8), degraded)


@pytest.mark.parametrize("audio", [torch.zeros(RATE), torch.ones(RATE // 20)])
def test_clips_without_a_value(audio):
    with pytest.raises(MetricError, match=r"silent|shorter"):
        pulses(audio, audio)
