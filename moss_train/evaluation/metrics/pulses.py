"""Pulses of the voice: whether the higher frequencies of a reconstruction still have the rhythm of the vocal folds.

The vocal folds close 80 to 400 times a second, and every closure excites all formants at once: above 1 kHz the envelope
of a voice rises and falls at that rate. A decoder that was trained with spectral distances alone has the right energy
in every band, but little of this fluctuation. STOI, PESQ and mel distances hardly show it; DistillMOS does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moss_train.evaluation.metrics.base import Column, Metric, MetricError, Pair

RATE = 16_000  # Hz
BAND = (2000.0, 6000.0)  # Hz
PULSE_RATES = (80.0, 400.0)  # Hz
FRAME = RATE // 10  # 0.1 s, samples
QUIETEST = 0.02  # frames of the reference with a smaller share of the energy of its loudest frame are left out
SILENCE = 1e-6  # share of the reference's energy below which a reconstruction counts as silent


@dataclass(frozen=True)
class VoicePulses(Metric):
    """Fluctuation of the envelope of a band at the rates of the voice, relative to the reference, in dB.

    0 is right; noise with the spectrum of speech, which changes every 25 ms, has about -4, smoother envelopes less.
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
