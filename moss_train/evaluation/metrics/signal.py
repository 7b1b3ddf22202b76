"""Metrics of waveforms: mel, STFT and SI-SDR distances, STOI and PESQ."""

import warnings
from dataclasses import dataclass

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
