"""Mean opinion scores predicted without a reference: DNSMOS (arXiv 2010.15258) and DistillMOS (arXiv 2502.05356).

The networks are part of the packages speechmos and distillmos, so nothing is downloaded. Both score the original, too:
a value says how natural speech sounds, but not whether it is the same voice or the same words.
"""

import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from statistics import fmean
from typing import Any

import numpy as np
import torch

from moss_train.evaluation.metrics.base import Column, Metric, MetricError, Pair, missing_package
from moss_train.utils.files import package_version

SAMPLING_RATE = 16_000  # Hz, of both networks
PART_LENGTH, LONGEST_HOP = 122_880, 16_000  # samples; DistillMOS is computed on overlapping parts of a clip


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
