"""Metrics of waveforms: mel, STFT and SI-SDR distances, STOI and PESQ, and mean opinion scores that networks predict.

DNSMOS (arXiv 2010.15258) and DistillMOS (arXiv 2502.05356) need no reference. Their networks are part of the packages
speechmos and distillmos, so nothing is downloaded. Both score the original, too: a value says how natural speech
sounds, but not whether it is the same voice or the same words.
"""

import math
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from statistics import fmean
from typing import Any

import numpy as np
import torch
from auraloss.time import SISDRLoss
from torch import Tensor

from moss_train.audio.stft import mel_bank
from moss_train.evaluation.metrics.base import Column, Metric, MetricError, Pair, missing_package
from moss_train.utils.files import package_version

SCALES = ((2048, 150), (512, 80))
"""Window length and number of mel filters of each scale; the hop is a quarter of the window."""

FLOOR = 1e-5
SAMPLING_RATE = 16_000  # Hz, of all metrics but the spectral distances
LONGEST_PESQ_SECONDS = 40
PART_LENGTH, LONGEST_HOP = 122_880, 16_000  # samples; DistillMOS is computed on overlapping parts of a clip


@dataclass(frozen=True)
class Profile:
    """Sampling rate and window of the spectral distances."""

    name: str
    sampling_rate: int  # Hz
    is_root_window: bool  # the square root of the periodic Hann window instead of the window


PROFILES = {
    "official": Profile("official", 16_000, True),
    "dac24k": Profile("dac24k", 24_000, False),
    "full48k": Profile("full48k", 48_000, False),
}
"""`official`: the released evaluation code. `dac24k`: audiotools at 24 kHz, probably behind the paper's table.
`full48k`: the whole band of audio at 48 kHz."""


def spectral_distances(reference: Tensor, degraded: Tensor, profile: Profile) -> dict[str, float]:
    """Return Mel-Loss and STFT-Dist. of one clip, by key: [T] twice at the profile's rate, 0 is identical.

    Raises:
        ValueError: audio too short to be mirrored at its ends.
    """
    totals = {"mel_loss": 0.0, "stft_distance": 0.0}
    for window_length, num_mels in SCALES:
        window = torch.hann_window(window_length)
        spectra = []  # [window_length // 2 + 1, frames], not normalised
        for audio in (reference, degraded):
            if audio.shape[-1] <= window_length // 2:
                raise ValueError(f"{audio.shape[-1]} samples are too few for a window of {window_length}")
            spectrum = torch.stft(
                audio.float(),
                n_fft=window_length,
                hop_length=window_length // 4,
                window=window.sqrt() if profile.is_root_window else window,
                center=True,
                pad_mode="reflect",
                return_complex=True,
            )
            spectra.append(spectrum.abs())
        bank = mel_bank(profile.sampling_rate, window_length, num_mels, torch.device("cpu"))
        for key, magnitudes in (("mel_loss", [x.T @ bank for x in spectra]), ("stft_distance", spectra)):
            wanted, got = (x.double() for x in magnitudes)
            logarithms = 2 * (wanted.clamp(min=FLOOR).log10() - got.clamp(min=FLOOR).log10())
            totals[key] += (logarithms.abs().mean() + (wanted - got).abs().mean()).item()
    return totals


@dataclass(frozen=True)
class Stoi(Metric):
    """Short-time objective intelligibility (Taal et al. 2011) by pystoi, at 16 kHz."""

    columns = (Column("stoi", "STOI", True, is_speech_only=True, decimals=3),)
    description = f"pystoi {package_version('pystoi')}, 16 kHz"

    def missing(self) -> str | None:
        return missing_package("pystoi")

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError where pystoi finds too few frames that are not silent."""
        from pystoi import stoi

        wanted, got = pair.at(SAMPLING_RATE)
        if not wanted.any():
            raise MetricError("the reference is silent", {"stoi": 0.0})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = float(stoi(wanted.double().numpy(), got.double().numpy(), SAMPLING_RATE, extended=False))
            except ValueError as error:
                raise MetricError(f"too short for STOI ({error})") from error
        if any("Not enough STFT frames" in str(warning.message) for warning in caught):
            raise MetricError("less than 0.4 seconds that are not silent", {"stoi": 1e-5})
        return {"stoi": value}


@dataclass(frozen=True)
class Pesq(Metric):
    """Perceptual evaluation of speech quality, ITU-T P.862 narrow band and P.862.2 wide band, both at 16 kHz.

    The reference program of P.862 has room for 49 utterances, between pauses of 0.2 s; more silently give wrong values
    or end the process. Read speech has up to one per second, so longer clips have no value.
    """

    columns = (
        Column("pesq_nb", "PESQ-NB", True, is_speech_only=True),
        Column("pesq_wb", "PESQ-WB", True, is_speech_only=True),
    )
    description = f"pesq {package_version('pesq')}, 16 kHz"

    def missing(self) -> str | None:
        return missing_package("pesq", "it compiles, with gcc and the headers of Python: pip install pesq")

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError where P.862 finds no utterance or less than 0.25 s, and for more than 40 s."""
        from pesq import PesqError, pesq

        wanted, got = pair.at(SAMPLING_RATE)
        if len(wanted) > LONGEST_PESQ_SECONDS * SAMPLING_RATE:
            raise MetricError(f"PESQ: longer than {LONGEST_PESQ_SECONDS} seconds (cut with clip_seconds)")
        if not got.any():
            raise MetricError("the reconstruction is silent")
        try:
            values = [float(pesq(SAMPLING_RATE, wanted.numpy(), got.numpy(), mode)) for mode in ("nb", "wb")]
        except (PesqError, ValueError) as error:
            reason = error.args[0] if error.args else error
            text = reason.decode() if isinstance(reason, bytes) else str(reason)
            raise MetricError(f"PESQ: {text}") from error
        return {"pesq_nb": values[0], "pesq_wb": values[1]}


@dataclass(frozen=True)
class SpectralDistances(Metric):
    """Mel-Loss and STFT-Dist. of one profile; lower is better."""

    profile: Profile
    columns = (
        Column("mel_loss", "Mel-Loss", False, decimals=3),
        Column("stft_distance", "STFT-Dist.", False, decimals=3),
    )

    @property
    def description(self) -> str:
        window = "sqrt-Hann" if self.profile.is_root_window else "Hann"
        return f"profile {self.profile.name}: {self.profile.sampling_rate} Hz, {window}, windows 2048 and 512"

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for audio shorter than half a window."""
        wanted, got = pair.at(self.profile.sampling_rate)
        try:
            return spectral_distances(wanted, got, self.profile)
        except ValueError as error:
            raise MetricError(str(error)) from error


@dataclass(frozen=True)
class SiSdr(Metric):
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2018), at 16 kHz without removing the mean."""

    columns = (Column("si_sdr", "SI-SDR", True),)
    description = f"auraloss {package_version('auraloss')}, 16 kHz"

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for a silent reference, for which the ratio is undefined."""
        wanted, got = (audio.double()[None] for audio in pair.at(SAMPLING_RATE))
        if not wanted.any():
            raise MetricError("the reference is silent")
        return {"si_sdr": -SISDRLoss(zero_mean=False, eps=1e-12)(got, wanted).item()}


def signal_metrics(profile: Profile) -> dict[str, Metric]:
    """Return the metrics that need no model: STOI, PESQ, the spectral distances and SI-SDR."""
    return {"stoi": Stoi(), "pesq": Pesq(), "spectral": SpectralDistances(profile), "si_sdr": SiSdr()}


def _columns(key: str, title: str) -> tuple[Column, Column]:
    return (
        Column(key, title, True, is_speech_only=True),
        Column(f"{key}_original", f"{title} orig.", True, is_speech_only=True, is_plotted=False),
    )


@dataclass(frozen=True)
class Dnsmos(Metric):
    """Overall quality, 1 to 5, of the reconstruction and of the original; meant for noise suppression."""

    columns = _columns("dnsmos", "DNSMOS")
    description = f"speechmos {package_version('speechmos')}, 16 kHz"

    def missing(self) -> str | None:
        reasons = (missing_package(name) for name in ("speechmos", "onnxruntime", "librosa"))
        return next((reason for reason in reasons if reason is not None), None)

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for clips whose samples are all equal."""
        wanted, got = (audio.clamp(-1, 1).numpy().tobytes() for audio in pair.at(SAMPLING_RATE))
        try:
            values = [_dnsmos_overall(samples) for samples in (got, wanted)]
        except (ValueError, ZeroDivisionError) as error:
            raise MetricError(f"DNSMOS: {error}") from error
        return dict(zip(("dnsmos", "dnsmos_original"), values, strict=True))


@lru_cache(maxsize=16)
def _dnsmos_overall(samples: bytes) -> float:
    """Return the overall quality of float32 samples; cached, because one original has many reconstructions."""
    from speechmos import dnsmos

    return float(dnsmos.run(np.frombuffer(samples, np.float32), SAMPLING_RATE)["ovrl_mos"])


@dataclass(frozen=True)
class DistillMos(Metric):
    """Quality, 1 to 5, of the reconstruction and of the original; learned from ratings of many kinds of degradation."""

    columns = _columns("distillmos", "DistillMOS")
    description = f"distillmos {package_version('distillmos')}, 16 kHz"

    def missing(self) -> str | None:
        reasons = (missing_package(name) for name in ("distillmos", "xls_r_sqa"))
        return next((reason for reason in reasons if reason is not None), None)

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; the network pads clips below 7.68 s with zeros and averages over parts of longer ones.

        MetricError for a silent reference, to which the network gives about 2.
        """
        if not pair.at(SAMPLING_RATE)[0].any():
            raise MetricError("the reference is silent")
        wanted, got = (audio.clamp(-1, 1).numpy().tobytes() for audio in pair.at(SAMPLING_RATE))
        values = [_distillmos(samples) for samples in (got, wanted)]
        return dict(zip(("distillmos", "distillmos_original"), values, strict=True))


@lru_cache(maxsize=16)
def _distillmos(samples: bytes) -> float:
    """Return the mean over the parts that the package itself would take of float32 samples, one part at a time.

    The package computes all parts of a clip in one batch, which takes 0.7 GB for every 10 seconds.
    """
    audio = torch.frombuffer(bytearray(samples), dtype=torch.float32)[None]
    spare = max(0, audio.shape[1] - PART_LENGTH)
    starts = np.linspace(0, 1, math.ceil(spare / LONGEST_HOP) + 1) * spare
    with torch.inference_mode():
        return fmean(float(_load_distillmos()(audio[:, int(start) :][:, :PART_LENGTH])) for start in starts)


@lru_cache(maxsize=1)
def _load_distillmos() -> Any:
    """Load the network once per process; it prints the path of its weights, which no user asked for."""
    from distillmos import ConvTransformerSQAModel

    with redirect_stdout(StringIO()):
        return ConvTransformerSQAModel().eval()
