"""Measures of a reconstruction against its reference, each with what it needs and what it may be compared with.

A metric is a frozen dataclass of plain options, so that it travels to worker processes and its description identifies a
result; whatever it loads is loaded there when first used.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Protocol

import torch
from auraloss.time import SISDRLoss
from torch import Tensor

from moss_train.audio import resample
from moss_train.evaluation.distances import Profile, mel_distance, stft_distance

SPEECH = "speech"
_SPEECH_RATE = 16_000
NAN_IS_ZERO = ("stoi", "mel_loss", "stft_distance")
"""Values that the released code counts as 0 when they are not finite; PESQ fails instead and is dropped."""


class MetricError(ValueError):
    """A metric has no value for this pair, with the reason, and what the released evaluation code counts instead."""

    def __init__(self, reason: str, official: Mapping[str, float] | None = None) -> None:
        super().__init__(reason)
        self.official = dict(official or {})


@dataclass(frozen=True)
class Column:
    """One column of the table: the mean of a value over clips, or the quotient of two sums over clips."""

    key: str  # of the value in a row
    title: str
    is_higher_better: bool
    denominator: str | None = None  # key of the second sum, such as the words behind a number of errors
    is_speech_only: bool = False  # says nothing about music and sounds, and is not computed for them
    decimals: int = 2
    is_plotted: bool = True  # false for values of the original, which no bitrate changes


class Pair:
    """Reference and reconstruction of one clip; each rate is computed once.

    Both [C, T] at one rate, averaged over channels and cut to the shorter, without alignment or level adjustment.
    """

    def __init__(
        self, reference: Tensor, degraded: Tensor, sampling_rate: int, labels: Mapping[str, str] | None = None
    ) -> None:
        self._audio = tuple(audio.detach().cpu().float().mean(0) for audio in (reference, degraded))
        self._sampling_rate = sampling_rate
        self.labels = dict(labels or {})  # domain, text and language of the clip, where known
        self._resampled: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def is_speech(self) -> bool:
        """Whether the clip belongs to the speech domain; true for clips without a domain."""
        return self.labels.get("domain", SPEECH) == SPEECH

    def at(self, sampling_rate: int) -> tuple[Tensor, Tensor]:
        """Reference and reconstruction [T] at a rate in Hz."""
        if sampling_rate not in self._resampled:
            wanted, got = (resample(audio, self._sampling_rate, sampling_rate) for audio in self._audio)
            length = min(len(wanted), len(got))
            self._resampled[sampling_rate] = wanted[:length], got[:length]
        return self._resampled[sampling_rate]

    @cached_property
    def problem(self) -> str | None:
        """Why no metric can score the pair, None when they can."""
        names = ("reference", "reconstruction")
        for name, audio in zip(names, self._audio, strict=True):
            if not torch.isfinite(audio).all():
                return f"the {name} contains NaN or infinite samples"
            if not len(audio):
                return f"the {name} has no samples"
        return None


class Metric(Protocol):
    """What scores a pair."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that the values become."""
        ...

    @property
    def description(self) -> str:
        """Backend and version: values of two metrics compare when their descriptions are equal."""
        ...

    def missing(self) -> str | None:
        """What has to be installed or given before the metric can be used, None when nothing is missing."""
        ...

    def score(self, pair: Pair) -> dict[str, float]:
        """Values by key; empty when the metric does not apply to the clip. Raises MetricError with the reason."""
        ...


@dataclass(frozen=True)
class Stoi:
    """Short-time objective intelligibility (Taal et al. 2011) by pystoi, at 16 kHz."""

    columns = (Column("stoi", "STOI", True, is_speech_only=True, decimals=3),)

    @property
    def description(self) -> str:
        """See `Metric`."""
        return f"pystoi {package_version('pystoi')}, 16 kHz"

    def missing(self) -> str | None:
        """See `Metric`."""
        return missing_package("pystoi")

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError where pystoi finds too few frames that are not silent."""
        import warnings

        from pystoi import stoi

        wanted, got = pair.at(_SPEECH_RATE)
        if not wanted.any():
            raise MetricError("the reference is silent", {"stoi": 0.0})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = float(stoi(wanted.double().numpy(), got.double().numpy(), _SPEECH_RATE, extended=False))
            except ValueError as error:
                raise MetricError(f"too short for STOI ({error})") from error
        if any("Not enough STFT frames" in str(warning.message) for warning in caught):
            raise MetricError("less than 0.4 seconds that are not silent", {"stoi": 1e-5})
        return {"stoi": value}


@dataclass(frozen=True)
class Pesq:
    """Perceptual evaluation of speech quality, ITU-T P.862 narrow band and P.862.2 wide band, both at 16 kHz."""

    columns = (
        Column("pesq_nb", "PESQ-NB", True, is_speech_only=True),
        Column("pesq_wb", "PESQ-WB", True, is_speech_only=True),
    )

    @property
    def description(self) -> str:
        """See `Metric`."""
        return f"pesq {package_version('pesq')}, 16 kHz"

    def missing(self) -> str | None:
        """See `Metric`."""
        return missing_package("pesq", "it compiles: gcc and the Python headers are needed")

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError where P.862 finds no utterance or less than a quarter of a second."""
        from pesq import PesqError, pesq

        wanted, got = pair.at(_SPEECH_RATE)
        if not got.any():
            raise MetricError("the reconstruction is silent")
        try:
            values = [float(pesq(_SPEECH_RATE, wanted.numpy(), got.numpy(), mode)) for mode in ("nb", "wb")]
        except (PesqError, ValueError) as error:
            reason = error.args[0] if error.args else error
            text = reason.decode() if isinstance(reason, bytes) else str(reason)
            raise MetricError(f"PESQ: {text}") from error
        return {"pesq_nb": values[0], "pesq_wb": values[1]}


@dataclass(frozen=True)
class SpectralDistances:
    """Mel-Loss and STFT-Dist. of one profile; lower is better."""

    profile: Profile
    columns = (
        Column("mel_loss", "Mel-Loss", False, decimals=3),
        Column("stft_distance", "STFT-Dist.", False, decimals=3),
    )

    @property
    def description(self) -> str:
        """See `Metric`."""
        window = "sqrt-Hann" if self.profile.is_root_window else "Hann"
        return f"profile {self.profile.name}: {self.profile.sampling_rate} Hz, {window}, windows 2048 and 512"

    def missing(self) -> str | None:
        """Nothing is ever missing."""
        return None

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for audio shorter than half a window."""
        wanted, got = pair.at(self.profile.sampling_rate)
        try:
            return {
                "mel_loss": mel_distance(wanted, got, self.profile),
                "stft_distance": stft_distance(wanted, got, self.profile),
            }
        except ValueError as error:
            raise MetricError(str(error)) from error


@dataclass(frozen=True)
class SiSdr:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2018), at 16 kHz without removing the mean."""

    columns = (Column("si_sdr", "SI-SDR", True),)

    @property
    def description(self) -> str:
        """See `Metric`."""
        return f"auraloss {package_version('auraloss')}, 16 kHz"

    def missing(self) -> str | None:
        """Nothing is ever missing."""
        return None

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for a silent reference, of which there is no ratio."""
        wanted, got = (audio.double()[None] for audio in pair.at(_SPEECH_RATE))
        if not wanted.any():
            raise MetricError("the reference is silent")
        return {"si_sdr": -SISDRLoss(zero_mean=False, eps=1e-12)(got, wanted).item()}


@dataclass(frozen=True)
class PairScores:
    """Values of one pair by key, and the reasons why metrics have none, by metric name."""

    values: dict[str, float]
    errors: dict[str, str]
    official: dict[str, float] = field(default_factory=dict)  # what the released code counts where we have no value


def score_pair(metrics: Mapping[str, Metric], pair: Pair) -> PairScores:
    """Apply every metric to a pair, on one thread so that the values do not depend on the machine's number of cores."""
    if not pair.is_speech:
        metrics = {name: metric for name, metric in metrics.items() if not is_for_speech(metric)}
    if pair.problem is not None:
        zeros = dict.fromkeys(NAN_IS_ZERO, 0.0) if "NaN" in pair.problem else {}
        return PairScores({}, dict.fromkeys(metrics, pair.problem), zeros)
    scores = PairScores({}, {})
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, metric in metrics.items():
            try:
                values = metric.score(pair)
                scores.values.update({key: value for key, value in values.items() if math.isfinite(value)})
                if bad := [key for key, value in values.items() if not math.isfinite(value)]:
                    raise MetricError(
                        f"{', '.join(bad)} is not finite", {key: 0.0 for key in bad if key in NAN_IS_ZERO}
                    )
            except MetricError as error:
                scores.errors[name] = str(error)
                scores.official.update(error.official)
    finally:
        torch.set_num_threads(num_threads)
    return scores


def is_for_speech(metric: Metric) -> bool:
    """Whether a metric says something about speech only."""
    return all(column.is_speech_only for column in metric.columns)


def split_available(metrics: Mapping[str, Metric]) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can be used here, and what the others miss, by name."""
    missing = {name: reason for name, metric in metrics.items() if (reason := metric.missing()) is not None}
    return {name: metric for name, metric in metrics.items() if name not in missing}, missing


def native_metrics(profile: Profile) -> dict[str, Metric]:
    """The metrics that need no model: STOI, PESQ, the spectral distances and SI-SDR."""
    return {"stoi": Stoi(), "pesq": Pesq(), "spectral": SpectralDistances(profile), "si_sdr": SiSdr()}


def columns_of(metrics: Mapping[str, Metric]) -> tuple[Column, ...]:
    """All columns of the metrics, in their order."""
    return tuple(column for metric in metrics.values() for column in metric.columns)


def missing_package(name: str, hint: str = "") -> str | None:
    """What to install when a package is not there, None when it is; nothing is imported."""
    if find_spec(name) is not None:
        return None
    return f"package {name} is not installed" + (f" ({hint})" if hint else "")


@lru_cache(maxsize=32)
def package_version(name: str) -> str:
    """Version of an installed package, or `missing`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
