"""The figure of a data report: distributions of what was measured of many clips."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NUM_BINS = 50
PANEL_INCHES = (4.2, 2.6)
COLUMNS = 3


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


def save_histograms(panels: Sequence[Histogram | Scatter], path: str | Path, title: str = "") -> None:
    """Draw every panel into one PNG, groups stacked in one colour each. Needs matplotlib (extra `eval`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    groups = sorted({group for panel in panels for group in panel.values})
    colours = {group: f"C{number % 10}" for number, group in enumerate(groups)}
    for panel, axis in zip(panels, axes, strict=False):
        if isinstance(panel, Histogram):
            _draw_histogram(axis, panel, colours)
        else:
            _draw_scatter(axis, panel, colours)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_visible(False)
    handles = [figure.axes[0].plot([], [], "s", color=colour, label=group)[0] for group, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, max(1, len(groups))), frameon=False)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _draw_histogram(axis, panel: Histogram, colours: Mapping[str, str]) -> None:
    values = {group: array[np.isfinite(array)] for group, array in panel.values.items()}
    values = {group: array[array > 0] if panel.logarithmic else array for group, array in values.items()}
    values = {group: array for group, array in sorted(values.items()) if len(array)}
    axis.set_xlabel(panel.label)
    axis.set_ylabel("clips")
    if not values:
        return
    joined = np.concatenate(list(values.values()))
    low, high = float(joined.min()), float(joined.max())
    if panel.logarithmic:
        bins = np.geomspace(low, max(high, low * 1.01), NUM_BINS + 1)
        axis.set_xscale("log")
    else:
        bins = np.linspace(low, max(high, low + 1e-6), NUM_BINS + 1)
    axis.hist(list(values.values()), bins=bins, stacked=True, color=[colours[group] for group in values])


def _draw_scatter(axis, panel: Scatter, colours: Mapping[str, str]) -> None:
    for group, (x, y) in sorted(panel.values.items()):
        axis.plot(x, y, ".", markersize=2, alpha=0.6, color=colours[group])
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
