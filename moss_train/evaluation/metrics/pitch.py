"""Pitch accuracy, patch-rate buzz and pulses of the voice: audible faults of a codec that loses the harmonics.

A decoder that writes the waveform patch by patch can reach a low mel distance while every patch repeats nearly the same
samples. The formants are right then, but the pitch is that of the patch rate. STOI hardly changes; these measures do.

The vocal folds close 80 to 400 times a second, and every closure excites all formants at once: above 1 kHz the envelope
of a voice rises and falls at that rate. A decoder that was trained with spectral distances alone has the right energy
in every band, but little of this fluctuation. STOI, PESQ and mel distances hardly show it; DistillMOS does.

torchaudio's pitch detector has no voicing decision and smooths over 0.3 s, so the estimator here is our own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.evaluation.metrics.base import Column, Metric, MetricError, Pair

RATE = 16_000
"""Sampling rate in Hz of all three measures."""

MIN_HZ, MAX_HZ = 60.0, 500.0
TOLERANCE = 0.05


def track_pitch(audio: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate F0 by the normalised cross-correlation of each frame with the samples after it (Talkin 1995).

    The period is the shortest lag whose peak reaches 0.9 of the highest one, which avoids results an octave too low. A
    parabola through the peak refines it. Frames start every 10 ms, compare 30 ms, and look for 60 to 500 Hz.

    Args:
        audio: [T] at 16 kHz.

    Returns:
        The frequency in Hz [N] of the strongest periodicity of every frame, voiced or not, and whether the frame is
        voiced, that is periodic and loud enough, [N] bool.

    Raises:
        ValueError: the audio is shorter than one frame, which takes 30 ms and the longest lag.
    """
    window, hop = round(0.03 * RATE), round(0.01 * RATE)
    shortest, longest = int(RATE / MAX_HZ), int(RATE / MIN_HZ) + 1
    span = window + longest + 1
    if len(audio) < span:
        raise ValueError(f"{len(audio)} samples are too few for a pitch, which needs {span}")
    frames = audio.double().unfold(0, span, hop)
    # Correlate the first `window` samples of each frame with those 0 to longest + 1 later: [N, longest + 2].
    size = 2 ** (span + window).bit_length()
    start = F.pad(frames[:, :window], (0, size - window))
    products = torch.fft.irfft(torch.fft.rfft(start).conj() * torch.fft.rfft(frames, n=size), n=size)
    sums = F.pad(frames.square().cumsum(1), (1, 0))
    energies = (sums[:, window:] - sums[:, : longest + 2]).clamp(min=1e-12)
    correlation = products[:, : longest + 2] / (energies[:, :1] * energies).sqrt()
    inside = correlation[:, shortest : longest + 1]
    is_peak = (inside >= correlation[:, shortest - 1 : longest]) & (
        inside >= correlation[:, shortest + 1 : longest + 2]
    )
    peaks = torch.where(is_peak, inside, -1.0)
    highest = peaks.amax(1, keepdim=True)
    lag = shortest + (peaks >= 0.9 * highest).int().argmax(1)
    before, peak, after = (correlation.gather(1, (lag + step)[:, None])[:, 0] for step in (-1, 0, 1))
    curvature = (before - 2 * peak + after).clamp(max=-1e-9)
    shift = (0.5 * (before - after) / curvature).clamp(-0.5, 0.5)
    energy = energies[:, 0]
    is_loud = energy > energy.max() * 10 ** (-35.0 / 10)  # less than 35 dB below the loudest frame of the clip
    return RATE / (lag + shift), (highest[:, 0] > 0.6) & is_loud


@dataclass(frozen=True)
class PitchAccuracy(Metric):
    """Share of the reference's voiced frames whose F0 in the reconstruction is within 5 % of the reference's.

    Noise instead of speech scores a few per cent, by chance.
    """

    columns = (Column("pitch", "Pitch", True, is_speech_only=True, decimals=3),)
    description = (
        f"normalised cross-correlation, {RATE // 1000} kHz, {MIN_HZ:.0f} to {MAX_HZ:.0f} Hz, within {TOLERANCE:.0%}"
    )

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for a reference without voiced frames."""
        wanted, got = pair.at(RATE)
        try:
            (reference, is_voiced), (degraded, _) = track_pitch(wanted), track_pitch(got)
        except ValueError as error:
            raise MetricError(str(error)) from error
        if not is_voiced.any():
            raise MetricError("the reference has no voiced frame")
        is_right = (degraded / reference - 1).abs() <= TOLERANCE
        return {"pitch": is_right[is_voiced].double().mean().item()}


BUZZ_WINDOW_SECONDS = 0.2
BUZZ_RANGE = (200.0, 4000.0)


@dataclass(frozen=True)
class PatchRateBuzz(Metric):
    """Level in dB by which a reconstruction has more energy at multiples of the patch rate than its reference.

    For every multiple from 200 to 4,000 Hz, the power within 10 Hz of it is compared with the power within 10 Hz of the
    two midpoints to its neighbours, in the mean spectrum of the clip; the levels in dB are averaged over the multiples.
    The same value of the reference is subtracted, so a voice whose pitch happens to be at the patch rate is not counted
    as buzz. 0 means no buzz.

    Args:
        patch_rate: frame rate in Hz of the last stage of the decoder, 100 for all published models.
    """

    patch_rate: float = 100.0
    columns = (Column("buzz", "Buzz (dB)", False),)

    @property
    def description(self) -> str:
        return f"multiples of {self.patch_rate:g} Hz, {BUZZ_RANGE[0]:g} to {BUZZ_RANGE[1]:g} Hz, above the reference"

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for audio shorter than the window or a silent reference."""
        wanted, got = pair.at(RATE)
        if len(wanted) < BUZZ_WINDOW_SECONDS * RATE:
            raise MetricError(f"shorter than {BUZZ_WINDOW_SECONDS} seconds")
        if not wanted.any():
            raise MetricError("the reference is silent")
        return {"buzz": patch_rate_level(got, self.patch_rate) - patch_rate_level(wanted, self.patch_rate)}


def patch_rate_level(audio: Tensor, patch_rate: float) -> float:
    """Compute the level in dB of multiples of a rate in Hz relative to the midpoints between; audio [T] at 16 kHz."""
    window = round(BUZZ_WINDOW_SECONDS * RATE)
    frames = audio.double().unfold(0, window, window // 2) * torch.hann_window(window, dtype=torch.float64)
    power = torch.fft.rfft(frames).abs().square().mean(0)
    # Between the harmonics of a synthetic tone the power is near zero: its level in dB would be meaningless.
    power = power.clamp(min=(1e-8 * power.max()).item())
    hertz = torch.arange(len(power)) * (RATE / window)

    def decibels(centre: float) -> Tensor:
        """Return the mean power in dB over the main lobe of the window around a frequency in Hz."""
        return 10 * power[(hertz - centre).abs() <= 10.0].mean().log10()

    multiples = torch.arange(1, int(BUZZ_RANGE[1] / patch_rate) + 1).double() * patch_rate
    levels = [
        decibels(centre) - 0.5 * (decibels(centre - patch_rate / 2) + decibels(centre + patch_rate / 2))
        for centre in multiples[multiples >= BUZZ_RANGE[0]].tolist()
    ]
    return torch.stack(levels).mean().item()


BAND = (2000.0, 6000.0)  # Hz
PULSE_RATES = (80.0, 400.0)  # Hz
FRAME = RATE // 10  # 0.1 s, samples
QUIETEST = 0.02  # frames of the reference with a smaller share of the energy of its loudest frame are left out
SILENCE = 1e-6  # share of the reference's energy below which a reconstruction counts as silent


@dataclass(frozen=True)
class VoicePulses(Metric):
    """Fluctuation of the envelope of a band at the rates of the voice, relative to the reference, in dB.

    0 is right; noise with the spectrum of speech, which changes every 25 ms, has -2 to -4, smoother envelopes less.
    Pulses at a wrong rate count, too, such as one patch that is repeated: see the metrics pitch and buzz.

    Args:
        band: lower and upper limit in Hz.
    """

    band: tuple[float, float] = BAND
    columns = (Column("pulses", "Pulses (dB)", True, is_speech_only=True),)

    @property
    def description(self) -> str:
        return "envelope of {:g} to {:g} Hz at {:g} to {:g} Hz".format(*self.band, *PULSE_RATES)

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for audio shorter than a frame, and if one of the two has no sound in the band."""
        wanted, got = pair.at(RATE)
        if len(wanted) < FRAME:
            raise MetricError(f"shorter than {FRAME / RATE} seconds")
        reference, degraded = (band_envelope(audio, *self.band).unfold(0, FRAME, FRAME // 2) for audio in (wanted, got))
        power = reference.square().mean(1)
        if not power.any():
            raise MetricError(f"the reference is silent from {self.band[0]:g} to {self.band[1]:g} Hz")
        loud = power >= QUIETEST * power.max()
        if degraded[loud].square().mean() <= SILENCE * power[loud].mean():
            raise MetricError(f"the reconstruction is silent from {self.band[0]:g} to {self.band[1]:g} Hz")
        return {"pulses": 10 * (fluctuation(degraded[loud]) / fluctuation(reference[loud])).log10().item()}


def band_envelope(audio: Tensor, low: float, high: float) -> Tensor:
    """Return the magnitude of the analytic signal between two frequencies in Hz; audio [T] at 16 kHz -> [T] float64."""
    spectrum = torch.fft.fft(audio.double())
    frequency = torch.fft.fftfreq(len(audio), 1 / RATE)
    return torch.fft.ifft(2 * spectrum * ((frequency >= low) & (frequency < high))).abs()


def fluctuation(frames: Tensor) -> Tensor:
    """Return the mean energy at the rates of the voice of frames [N, FRAME] of an envelope, each scaled to mean 1."""
    window = torch.hann_window(frames.shape[1], dtype=frames.dtype)
    scaled = frames / frames.mean(1, keepdim=True).clamp(min=1e-12) - 1
    energy = torch.fft.rfft(scaled * window).abs().square()
    rate = torch.fft.rfftfreq(frames.shape[1], 1 / RATE)
    return energy[:, (rate >= PULSE_RATES[0]) & (rate <= PULSE_RATES[1])].sum(1).mean()
