"""The level of training audio: peak or loudness normalisation, and a random gain."""

import math

from torch import Tensor

from moss_train.audio.loudness import loudness, power_spectrum
from moss_train.data.stream.stream import ClipFormat

MAX_GAIN_DB = 30.0
"""Most that loudness normalisation changes a clip: what is quieter is not what it should be."""


def adjust_level(audio: Tensor, clip_format: ClipFormat, gain_unit: float) -> Tensor:
    """Bring audio [C, T] to the level that a format asks for; silence stays silent, nothing exceeds full scale."""
    audio = scale_to_peak(audio, clip_format.peak)
    gain_db = 0.0
    if clip_format.loudness_lufs is not None:
        wanted = clip_format.loudness_lufs - loudness(power_spectrum(audio), clip_format.sampling_rate)
        gain_db = min(max(wanted, -MAX_GAIN_DB), MAX_GAIN_DB) if math.isfinite(wanted) else 0.0
    if clip_format.gain_db is not None:
        lowest, highest = clip_format.gain_db
        gain_db += lowest + (highest - lowest) * gain_unit
    if gain_db == 0 or not (peak := audio.abs().max().item()):
        return audio
    return audio * min(10 ** (gain_db / 20), max(1.0, 1 / peak) if gain_db > 0 else 1.0)


def scale_to_peak(audio: Tensor, peak: float | None) -> Tensor:
    """Scale audio to a highest absolute sample; silence stays silent, None changes nothing."""
    if peak is None or audio.numel() == 0:
        return audio
    highest = audio.abs().max()
    return audio * (peak / highest) if highest > 0 else audio
