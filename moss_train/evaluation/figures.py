"""Figures for people: what the numbers cannot show."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from torch import Tensor

from moss_train.losses.mel import log_mel_spectrogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

WINDOW_LENGTH = 1024
NUM_MELS = 128
RANGE_DB = 80.0
PANEL_INCHES = (9.0, 1.75)


def save_spectrograms(
    waveforms: Mapping[str, Tensor], sampling_rate: int, path: str | Path | BinaryIO, title: str = ""
) -> None:
    """Log-mel spectrograms of several versions of one clip, one below the other, as a PNG.

    waveforms: name -> [C, T], the original first; channels are averaged. All panels share time, frequency and a colour
    scale in decibels below the loudest point of the first. Needs matplotlib (extra `eval`). ValueError without
    waveforms.
    """
    if not waveforms:
        raise ValueError("a spectrogram figure needs at least one waveform, got none")
    # The object interface, not pyplot: no global state, no window, no backend to choose.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = PANEL_INCHES
    figure = Figure(figsize=(width, 0.7 + height * len(waveforms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(waveforms), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    levels = {name: _decibels(waveform, sampling_rate) for name, waveform in waveforms.items()}
    loudest = next(iter(levels.values())).max().item()
    for panel, (name, level) in zip(axes, levels.items(), strict=True):
        seconds = waveforms[name].shape[-1] / sampling_rate
        image = _draw(panel, name, (level - loudest).clamp(min=-RANGE_DB), seconds)
    _label_frequencies(axes[0], sampling_rate)
    axes[-1].set_xlabel("time (s)")
    figure.supylabel("frequency (kHz, mel scale)", fontsize="medium")
    figure.colorbar(image, ax=list(axes), label="level (dB)", pad=0.01, fraction=0.03, aspect=12 * len(axes))
    if title:
        figure.suptitle(title, fontsize="large")
    figure.savefig(path, dpi=130)


def _decibels(waveform: Tensor, sampling_rate: int) -> Tensor:
    """[C, T] -> [NUM_MELS, frames] in dB."""
    mono = waveform.detach().float().cpu().mean(0)
    return 20 * log_mel_spectrogram(mono, sampling_rate, WINDOW_LENGTH, NUM_MELS, floor=1e-8)


def _draw(panel: "Axes", name: str, level: Tensor, seconds: float) -> "AxesImage":
    panel.set_title(name, loc="left", fontsize="medium", pad=3)
    return panel.imshow(
        level.numpy(),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=-RANGE_DB,
        vmax=0,
        extent=(0, seconds, 0, NUM_MELS),
    )


def _label_frequencies(panel: "Axes", sampling_rate: int) -> None:
    """Ticks at round frequencies, placed by the Slaney scale: linear to 1 kHz, logarithmic above."""
    nyquist = sampling_rate / 2
    kilohertz = [value for value in (0, 1, 2, 4, 8, 16) if value * 1000 <= nyquist]
    # The centre of row i, drawn at i + 0.5, is the (i + 1)-th of NUM_MELS + 1 equal steps on the mel scale.
    rows = [_slaney_mel(value * 1000) / _slaney_mel(nyquist) * (NUM_MELS + 1) - 0.5 for value in kilohertz]
    panel.set_yticks(rows)
    panel.set_yticklabels([str(value) for value in kilohertz])


def _slaney_mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) / (math.log(6.4) / 27)
