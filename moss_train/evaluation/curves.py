"""Curves over updates as one picture, a panel per subject."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2
PANEL_INCHES = (5.2, 2.9)


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
    dots: bool = False  # few values, each one a measurement


def save_curves(panels: Sequence[Panel], path: Path, title: str, marks: Mapping[str, float] | None = None) -> None:
    """Draw panels as a PNG; `marks` are updates to name, such as the beginnings of stages. Needs matplotlib."""
    # The object interface, not pyplot: no global state, no window, no backend to choose.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for panel, place in zip(panels, axes, strict=False):
        _draw(place, panel, marks or {})
    for place in axes[len(panels) :]:
        place.set_axis_off()
    figure.suptitle(title, fontsize="large")
    figure.savefig(path, dpi=110)


def _draw(axes: "Axes", panel: Panel, marks: Mapping[str, float]) -> None:
    for curve in panel.curves:
        style = "-o" if panel.dots else "-"
        axes.plot(curve.updates, curve.values, style, label=curve.name, linewidth=1.2, markersize=3)
    for name, update in marks.items():
        axes.axvline(update, color="0.6", linestyle=":", linewidth=1)
        axes.annotate(f" {name}", (update, 1), xycoords=("data", "axes fraction"), va="top", fontsize=7, color="0.4")
    axes.set_title(panel.title, fontsize="medium", loc="left")
    axes.set_xlabel("update", fontsize="small")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if panel.logarithmic:
        axes.set_yscale("log")
    if len(panel.curves) > 1:
        axes.legend(fontsize=7)
