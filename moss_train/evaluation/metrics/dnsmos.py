"""DNSMOS (arXiv 2010.15258): predict speech quality without a reference, with the networks of the speechmos package."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moss_train.evaluation.metrics.base import Column, MetricError, Pair, missing_package, package_version

SAMPLING_RATE = 16_000


@dataclass(frozen=True)
class Dnsmos:
    """Overall quality, 1 to 5, of the reconstruction and of the original."""

    columns = (
        Column("dnsmos", "DNSMOS", True, is_speech_only=True),
        Column("dnsmos_original", "DNSMOS orig.", True, is_speech_only=True, is_plotted=False),
    )

    @property
    def description(self) -> str:
        """See `Metric`."""
        return f"speechmos {package_version('speechmos')}, 16 kHz"

    def missing(self) -> str | None:
        """See `Metric`."""
        reasons = (missing_package(name) for name in ("speechmos", "onnxruntime", "librosa"))
        return next((reason for reason in reasons if reason is not None), None)

    def score(self, pair: Pair) -> dict[str, float]:
        """See `Metric`; MetricError for clips without samples that differ."""
        wanted, got = (audio.clamp(-1, 1).numpy().tobytes() for audio in pair.at(SAMPLING_RATE))
        try:
            values = [_overall(samples) for samples in (got, wanted)]
        except (ValueError, ZeroDivisionError) as error:
            raise MetricError(f"DNSMOS: {error}") from error
        return dict(zip(("dnsmos", "dnsmos_original"), values, strict=True))


@lru_cache(maxsize=16)
def _overall(samples: bytes) -> float:
    """Overall quality of float32 samples; the original of many reconstructions is heard once."""
    from speechmos import dnsmos

    return float(dnsmos.run(np.frombuffer(samples, np.float32), SAMPLING_RATE)["ovrl_mos"])
