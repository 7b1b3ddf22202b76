"""The progress bar of all commands."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


@dataclass
class ProgressTask:
    """One running bar. `note` appears below it, such as the hours of audio done so far."""

    progress: Progress
    task_id: TaskID

    @property
    def is_visible(self) -> bool:
        """Whether there is a terminal that shows the bar."""
        return not self.progress.disable

    def advance(self, count: float = 1, note: str | None = None) -> None:
        """Move the bar by `count` units; replace the note where one is given."""
        self.progress.update(self.task_id, advance=count)
        if note is not None:
            self.progress.update(self.task_id, note=note)

    def describe(self) -> str:
        """Return the state in one plain line: description, count, unit, seconds."""
        task = self.progress.tasks[self.task_id]
        total = "" if task.total is None else f"/{task.total:g}"
        note = f", {task.fields['note']}" if task.fields["note"] else ""
        return f"{task.description}: {task.completed:g}{total} {task.fields['unit']} in {task.elapsed or 0:.1f} s{note}"


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} {task.fields['unit']}/s", style="progress.data.speed")


class _ProgressWithNotes(Progress):
    """Bars with their notes on lines of their own: beside the bar a terminal of 80 columns would cut them."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["note"]:
                yield Text(task.fields["note"])


@contextmanager
def progress(
    description: str, total: float | None = None, unit: str = "clips", completed: int = 0
) -> Iterator[ProgressTask]:
    """Show a bar with count, rate and remaining time on stderr; without a terminal print one plain line at the end.

    Args:
        description: what is being done, as in "encoding".
        total: number of units, None when it is not known.
        unit: plural noun of what is counted.
        completed: units that were done earlier; rate and remaining time ignore them.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),  # leaves room for counts of seven digits in 80 columns
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    # Rate and remaining time are estimated over the last minutes: a unit may take longer than rich's default of 30 s.
    bar = _ProgressWithNotes(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=300.0)
    task = ProgressTask(bar, bar.add_task(description, total=total, completed=completed, unit=unit, note=""))
    try:
        with bar:
            yield task
    finally:
        if not console.is_terminal:
            console.print(task.describe(), markup=False, highlight=False, soft_wrap=True)
