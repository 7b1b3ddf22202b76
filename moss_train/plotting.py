"""Figures: spectrograms, curves and histograms. The only module that draws with matplotlib."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from torch import Tensor

from moss_train.audio.stft import log_mel_spectrogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure


NUM_MELS = 128
RANGE_DB = 80.0

_FALLBACK_FONTS = (  # for characters that matplotlib's own font lacks: Chinese, Japanese, Korean; used if installed
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Noto Sans JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "IPAGothic",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans",
    "Arial Unicode MS",
)


@lru_cache(maxsize=1)
def _families() -> tuple[str, ...]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed))


@lru_cache(maxsize=1)
def _known_characters() -> frozenset[int]:
    from matplotlib import font_manager

    files = [font_manager.findfont(name) for name in _families()]
    return frozenset(code for file in files for code in font_manager.get_font(file).get_charmap())


@contextmanager
def _fonts() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({"font.family": list(_families())}):
        yield


def drawable(text: str) -> str:
    """Return a text that a figure can show: on one line, not a formula, escaped if no font has its characters."""
    text = " ".join(text.split())
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    if not all(ord(character) in _known_characters() for character in text):
        text = text.encode("ascii", "backslashreplace").decode()
    return text.replace("$", r"\$")


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches, without pyplot: no global state, no window, no backend to choose."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@_fonts()
def save_spectrograms(
    waveforms: Mapping[str, Tensor], sampling_rate: int, path: str | Path | BinaryIO, title: str = ""
) -> None:
    """Save log-mel spectrograms of several versions of one clip, one below the other, as a PNG.

    waveforms: name -> [C, T], the original first; channels are averaged. All panels share time, frequency and a colour
    scale in decibels relative to the loudest point of the first. Needs matplotlib (extra `eval`). Raises ValueError
    without waveforms.
    """
    if not waveforms:
        raise ValueError("a spectrogram figure needs at least one waveform, got none")
    figure = new_figure(9.0, 0.7 + 1.75 * len(waveforms))
    axes = figure.subplots(len(waveforms), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    levels = {name: _decibels(waveform, sampling_rate) for name, waveform in waveforms.items()}
    loudest = next(iter(levels.values())).max().item()
    for panel, (name, level) in zip(axes, levels.items(), strict=True):
        panel.set_title(drawable(name), loc="left", fontsize="medium", pad=3)
        image = panel.imshow(
            (level - loudest).clamp(min=-RANGE_DB).numpy(),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            vmin=-RANGE_DB,
            vmax=0,
            extent=(0, waveforms[name].shape[-1] / sampling_rate, 0, NUM_MELS),
        )
    # Ticks at round frequencies, placed by the Slaney scale: linear to 1 kHz, logarithmic above. The centre of row i,
    # drawn at i + 0.5, is the (i + 1)-th of NUM_MELS + 1 equal steps on the mel scale.
    nyquist = sampling_rate / 2
    kilohertz = [value for value in (0, 1, 2, 4, 8, 16) if value * 1000 <= nyquist]
    rows = [_slaney_mel(value * 1000) / _slaney_mel(nyquist) * (NUM_MELS + 1) - 0.5 for value in kilohertz]
    axes[0].set_yticks(rows)
    axes[0].set_yticklabels([str(value) for value in kilohertz])
    axes[-1].set_xlabel("time (s)")
    figure.supylabel("frequency (kHz, mel scale)", fontsize="medium")
    figure.colorbar(image, ax=list(axes), label="level (dB)", pad=0.01, fraction=0.03, aspect=12 * len(axes))
    if title:
        figure.suptitle(drawable(title), fontsize="large")
    figure.savefig(path, dpi=130)


def _decibels(waveform: Tensor, sampling_rate: int) -> Tensor:
    """[C, T] -> [NUM_MELS, frames] in dB."""
    mono = waveform.detach().float().cpu().mean(0)
    return 20 * log_mel_spectrogram(mono, sampling_rate, 1024, NUM_MELS, floor=1e-8)


def _slaney_mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) / (math.log(6.4) / 27)


@dataclass(frozen=True)
class Curve:
    """One line: a name, updates, and values."""

    name: str
    updates: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis."""

    title: str
    curves: Sequence[Curve]
    logarithmic: bool = False
    dots: bool = False  # also mark every value, for few values that are measurements


@_fonts()
def save_curves(panels: Sequence[Panel], path: Path, title: str, marks: Mapping[str, float] | None = None) -> None:
    """Draw panels as a PNG; `marks` maps names to updates, such as the starts of stages. Needs matplotlib."""
    rows = -(-len(panels) // 2)
    figure = new_figure(2 * 5.2, 2.9 * rows + 0.4)
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for panel, place in zip(panels, axes, strict=False):
        for curve in panel.curves:
            style = "-o" if panel.dots else "-"
            place.plot(curve.updates, curve.values, style, label=drawable(curve.name), linewidth=1.2, markersize=3)
        for name, update in (marks or {}).items():
            place.axvline(update, color="0.6", linestyle=":", linewidth=1)
            place.annotate(
                f" {name}", (update, 1), xycoords=("data", "axes fraction"), va="top", fontsize=7, color="0.4"
            )
        place.set_title(drawable(panel.title), fontsize="medium", loc="left")
        place.set_xlabel("update", fontsize="small")
        place.tick_params(labelsize=8)
        place.grid(alpha=0.3)
        if panel.logarithmic:
            place.set_yscale("log")
        if len(panel.curves) > 1:
            place.legend(fontsize=7)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    figure.suptitle(drawable(title), fontsize="large")
    figure.savefig(path, dpi=110)


NUM_BINS = 50


@dataclass(frozen=True)
class Histogram:
    """Values of one quantity, by group."""

    label: str  # with the unit
    values: Mapping[str, np.ndarray]
    logarithmic: bool = False


@dataclass(frozen=True)
class Scatter:
    """Pairs of two quantities, by group."""

    x_label: str
    y_label: str
    values: Mapping[str, tuple[np.ndarray, np.ndarray]]


@_fonts()
def save_histograms(panels: Sequence[Histogram | Scatter], path: str | Path, title: str = "") -> None:
    """Draw all panels into one PNG, with groups stacked in one colour each. Needs matplotlib (extra `eval`)."""
    rows = -(-len(panels) // 3)
    figure = new_figure(3 * 4.2, 2.6 * rows + 0.5)
    axes = figure.subplots(rows, 3, squeeze=False).flat
    groups = sorted({group for panel in panels for group in panel.values})
    colours = {group: f"C{number % 10}" for number, group in enumerate(groups)}
    for panel, axis in zip(panels, axes, strict=False):
        if isinstance(panel, Histogram):
            values = {group: array[np.isfinite(array)] for group, array in sorted(panel.values.items())}
            values = {group: array[array > 0] if panel.logarithmic else array for group, array in values.items()}
            values = {group: array for group, array in values.items() if len(array)}
            if values:
                joined = np.concatenate(list(values.values()))
                low, high = float(joined.min()), float(joined.max())
                bins = np.linspace(low, max(high, low + 1e-6), NUM_BINS + 1)
                if panel.logarithmic:
                    bins = np.geomspace(low, max(high, low * 1.01), NUM_BINS + 1)
                    axis.set_xscale("log")
                axis.hist(list(values.values()), bins=bins, stacked=True, color=[colours[group] for group in values])
            axis.set_xlabel(panel.label)
            axis.set_ylabel("clips")
        else:
            for group, (x, y) in sorted(panel.values.items()):
                axis.plot(x, y, ".", markersize=2, alpha=0.6, color=colours[group])
            axis.set_xlabel(panel.x_label)
            axis.set_ylabel(panel.y_label)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_visible(False)
    handles = [
        figure.axes[0].plot([], [], "s", color=colour, label=drawable(group))[0] for group, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, max(1, len(groups))), frameon=False)
    if title:
        figure.suptitle(drawable(title))
    figure.savefig(path, dpi=110)
