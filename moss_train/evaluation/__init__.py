"""Evaluate codecs: metrics, statistics, reports."""

from moss_train.evaluation.baselines import (
    BASELINES,
    ClipDistances,
    MelReport,
    Reconstructions,
    low_pass,
    mean_power_spectrum,
    mel_report,
    shaped_noise,
)
from moss_train.plotting import save_spectrograms

__all__ = [
    "BASELINES",
    "ClipDistances",
    "MelReport",
    "Reconstructions",
    "low_pass",
    "mean_power_spectrum",
    "mel_report",
    "save_spectrograms",
    "shaped_noise",
]
