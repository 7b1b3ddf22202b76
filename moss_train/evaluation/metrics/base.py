"""The metric interface: compare a reconstruction with its reference; what a metric needs and how its column is named.

A metric is a frozen dataclass of plain options, so that it can be sent to worker processes and its description
identifies a result; models are loaded in the worker on first use.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from moss_train.audio.io import resample

SPEECH = "speech"
NAN_IS_ZERO = ("stoi", "mel_loss", "stft_distance")
"""Values that the released code counts as 0 when they are not finite; PESQ fails instead and is dropped."""


class MetricError(ValueError):
    """A metric has no value for this pair; holds the reason, and the values that the released code counts instead."""

    def __init__(self, reason: str, official: Mapping[str, float] | None = None) -> None:
        super().__init__(reason)
        self.official = dict(official or {})


@dataclass(frozen=True)
class Column:
    """One column of the table: the mean of a value over clips, or the quotient of two sums over clips."""

    key: str  # of the value in a row
    title: str
    is_higher_better: bool
    denominator: str | None = None  # key of the second sum, such as the number of words for a number of errors
    is_speech_only: bool = False  # is meaningless for music and sounds, and not computed for them
    decimals: int = 2
    is_plotted: bool = True  # false for values of the original, which no bitrate changes


class Pair:
    """Reference and reconstruction of one clip, resampled once for every rate that is asked for.

    Both are [C, T] at one rate; they are averaged over channels and cut to the shorter one, without alignment or level
    adjustment.
    """

    def __init__(
        self, reference: Tensor, degraded: Tensor, sampling_rate: int, labels: Mapping[str, str] | None = None
    ) -> None:
        self._audio = tuple(audio.detach().cpu().float().mean(0) for audio in (reference, degraded))
        self._sampling_rate = sampling_rate
        self.labels = dict(labels or {})  # domain (speech where there is none), text and language of the clip
        self._resampled: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, sampling_rate: int) -> tuple[Tensor, Tensor]:
        """Return the reference and reconstruction [T] at a rate in Hz."""
        if sampling_rate not in self._resampled:
            wanted, got = (resample(audio, self._sampling_rate, sampling_rate) for audio in self._audio)
            length = min(len(wanted), len(got))
            self._resampled[sampling_rate] = wanted[:length], got[:length]
        return self._resampled[sampling_rate]

    @cached_property
    def problem(self) -> str | None:
        """Why no metric can score the pair, None when they can."""
        for name, audio in zip(("reference", "reconstruction"), self._audio, strict=True):
            if not torch.isfinite(audio).all():
                return f"the {name} contains NaN or infinite samples"
            if not len(audio):
                return f"the {name} has no samples"
        return None


class Metric(Protocol):
    """The interface of a metric, which scores pairs."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of the table that are made from the values."""

    @property
    def description(self) -> str:
        """Backend and version: values of two metrics compare when their descriptions are equal."""

    def missing(self) -> str | None:
        """Return what has to be installed or given before the metric can be used, None when nothing is missing."""
        return None

    def score(self, pair: Pair) -> dict[str, float]:
        """Return the values by key; empty if the metric does not apply to the clip.

        Raises:
            MetricError: there is no value, with the reason.
        """


@dataclass(frozen=True)
class PairScores:
    """Values of one pair by key, and the reasons why metrics have none, by metric name."""

    values: dict[str, float]
    errors: dict[str, str]
    official: dict[str, float] = field(default_factory=dict)  # what the released code counts where we have no value


def score_pair(metrics: Mapping[str, Metric], pair: Pair) -> PairScores:
    """Apply every metric to a pair, on one thread so that the values do not depend on the machine's number of cores."""
    if pair.labels.get("domain", SPEECH) != SPEECH:
        metrics = {
            name: metric
            for name, metric in metrics.items()
            if not all(column.is_speech_only for column in metric.columns)
        }
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


def split_available(metrics: Mapping[str, Metric]) -> tuple[dict[str, Metric], dict[str, str]]:
    """Return the metrics that can be used here and, by name, what is missing for the others."""
    missing = {name: reason for name, metric in metrics.items() if (reason := metric.missing()) is not None}
    return {name: metric for name, metric in metrics.items() if name not in missing}, missing


def columns_of(metrics: Mapping[str, Metric]) -> tuple[Column, ...]:
    """Return all columns of the metrics, in their order."""
    return tuple(column for metric in metrics.values() for column in metric.columns)


def missing_package(name: str, hint: str = "") -> str | None:
    """Return what to install when a package is not there, None when it is; nothing is imported."""
    if find_spec(name) is not None:
        return None
    return f"package {name} is not installed" + (f" ({hint})" if hint else "")
