"""The logger interface (rows of a few tables and audio samples), and the loggers for CSV, progress and TensorBoard.

The CSV files are complete after a kill, continued by a resume, and readable without this package.
"""

import csv
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moss_train.audio.io import read_audio
from moss_train.config.old_names import present_column
from moss_train.utils.errors import UserError
from moss_train.utils.files import add_path_to_error, atomic_write
from moss_train.utils.progress import progress

TABLES = ("metrics", "codebooks", "audio_hours", "validation")
"""One row per update; use of every codebook level; hours by domain; scores on held-out audio. Each has `update`."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ClipSample:
    """The model's reconstructions of one held-out clip, as files."""

    update: int
    name: str  # of the clip, safe in file names
    audio: Mapping[str, Path]  # "original", "levels-32", ... -> FLAC
    picture: Path | None  # spectrograms; None without matplotlib
    texts: Mapping[str, str]  # "truth", "levels-32", ...; empty for a clip without text


class Writer:
    """Base class of loggers; each one writes what it can show and ignores the rest."""

    def start(self, update: int) -> None:
        """Begin, or continue after `update`; entries of later updates will be written again."""

    def write(self, table: str, row: Row) -> None:
        """Log a row of one of TABLES."""

    def show(self, samples: Sequence[ClipSample]) -> None:
        """Log samples, all of one update."""

    def close(self) -> None:
        """Finish; may be called more than once."""


class LoggerCollection:
    """Passes rows and samples to all writers on rank 0, and does nothing on other ranks."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = tuple(writers)

    def start(self, update: int, *, is_main: bool) -> None:
        if not is_main:
            self.writers = ()
        for writer in self.writers:
            writer.start(update)

    def write(self, table: str, row: Row) -> None:
        assert table in TABLES, table
        for writer in self.writers:
            writer.write(table, row)

    def show(self, samples: Sequence[ClipSample]) -> None:
        for writer in self.writers:
            writer.show(samples)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class CsvWriter(Writer):
    """Writes one table, with floats in full precision; a resumed run continues after the rows up to its checkpoint.

    Args:
        path: path of the file; its stem is the name of the table.
        columns: columns of a new file; an existing file keeps its own and gets the missing ones.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)

    def start(self, update: int) -> None:
        """Open the file and drop rows of updates that are about to be repeated; from update 0, these are all rows."""
        known = next((list(row) for row in iterate_table(self.path)), [])
        columns = [*known, *(name for name in self.columns if name not in known)]
        with atomic_write(self.path) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(row for row in iterate_table(self.path) if update and int(row["update"]) <= update)
        self.file = self.path.open("a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, columns, restval="")

    def write(self, table: str, row: Row) -> None:
        """Append a row and flush, so that a kill loses nothing."""
        if table == self.path.stem:
            with add_path_to_error(self.path):
                self.writer.writerow(row)
                self.file.flush()

    def close(self) -> None:
        if hasattr(self, "file"):
            with add_path_to_error(self.path):  # a row that is still buffered can meet a full disk again
                self.file.close()


def iterate_table(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a table under the current names of its columns; rows that a kill cut short are left out.

    A missing file has no rows.

    Raises:
        UserError: the file is not a table of a run.
    """
    if not path.exists():
        return
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(line for line in file if line.endswith("\n"))
            if rows.fieldnames and "update" not in rows.fieldnames:
                raise UserError(f"{path} is damaged: it has no column update; restore it, or move it away")
            names = {name: present_column(name) for name in rows.fieldnames or ()}
            for row in rows:
                if (row["update"] or "").isdigit():
                    yield {new: row[old] for old, new in names.items()}
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or move it away") from error


def read_table(path: Path) -> list[dict[str, str]]:
    """Return all rows of a table (see `iterate_table`)."""
    return list(iterate_table(path))


class ProgressWriter(Writer):
    """Shows updates done, speed and time left, with the most important losses and the last validation.

    Args:
        updates: number of updates of the whole run.
        line_seconds: minimum seconds between two lines if there is no terminal; ten times that once ten times as long
            has passed, which keeps the log of a long batch job short.
    """

    def __init__(self, updates: int, line_seconds: float = 60.0) -> None:
        self.updates = updates
        self.line_seconds = line_seconds
        self.stack = ExitStack()
        self.note = self.validation = ""

    def start(self, update: int) -> None:
        self.first_update = update
        self.started = self.last_line = time.monotonic()
        bar = progress("training", total=self.updates, unit="updates", completed=update)
        self.task = self.stack.enter_context(bar)

    def write(self, table: str, row: Row) -> None:
        """Advance by an update, with stage, losses and speed; remember a validation."""
        if table == "validation":
            self.validation = f", held out {row['mel_distance']:.3f}"
            self.task.advance(0, note=self.note + self.validation)
        if table != "metrics":
            return
        self.note = f"{row['stage']}: rec {row.get('loss/reconstruction', float('nan')):.3f}"
        if "loss/semantic" in row:
            self.note += f", sem {row['loss/semantic']:.2f}"
        if "loss/discriminators" in row:
            self.note += f", D {row['loss/discriminators']:.2f}"
        speed = row["audio_seconds_per_second"]
        self.note += f", {speed:.{0 if speed >= 10 else 2}f} audio-s/s"
        if "mfu" in row:
            self.note += f", MFU {row['mfu']:.1%}"
        note = self.note + self.validation
        self.task.advance(1, note=note)
        now, update = time.monotonic(), row["update"]
        pause = self.line_seconds * (1 if now - self.started <= 10 * self.line_seconds else 10)
        if not self.task.is_visible and now - self.last_line >= pause:
            self.last_line = now
            left = clock((now - self.started) / (update - self.first_update) * (self.updates - update))
            print(f"training: {update}/{self.updates} updates, {left} left, {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.stack.close()


def clock(seconds: float) -> str:
    """Return seconds formatted as hours and minutes, preceded by days if there are any."""
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days} d {hours:02d}:{minutes % 60:02d} h" if days else f"{hours}:{minutes % 60:02d} h"


class TensorBoardWriter(Writer):
    """Logs every number as a scalar, samples as audio and text; `tensorboard --logdir <run directory>` shows them.

    Args:
        directory: folder of the event files.
        every_updates: updates between two logged rows of the metrics table; other tables are logged completely.

    Raises:
        UserError: the package tensorboard is missing.
    """

    def __init__(self, directory: Path, every_updates: int) -> None:
        if find_spec("tensorboard") is None:
            raise UserError("tensorboard=true needs a package: pip install tensorboard, or tensorboard=false")
        self.directory = directory
        self.every_updates = every_updates
        self.events: Any = None

    def start(self, update: int) -> None:
        """Open the next event file; entries of earlier files about later updates are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(self.directory), purge_step=update + 1)

    def write(self, table: str, row: Row) -> None:
        if table == "metrics" and row["update"] % self.every_updates:
            return
        for name, value in row.items():
            if name != "update" and isinstance(value, int | float):
                self.events.add_scalar(name if table == "metrics" else f"{table}/{name}", value, row["update"])

    def show(self, samples: Sequence[ClipSample]) -> None:
        """Add audio and texts; spectrograms are pictures in the run directory."""
        for sample in samples:
            for label, path in sample.audio.items():
                audio, rate = read_audio(path, num_channels=1)
                self.events.add_audio(f"{sample.name}/{label}", audio, sample.update, sample_rate=rate)
            if sample.texts:
                lines = "  \n".join(f"{label}: {text}" for label, text in sample.texts.items())
                self.events.add_text(f"{sample.name}/transcripts", lines, sample.update)
        self.events.flush()

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
            self.events = None
