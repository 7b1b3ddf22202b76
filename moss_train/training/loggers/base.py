"""The logger interface: rows of a few tables and audio samples, handed to every logger; and CSV files.

The CSV files are complete after a kill, continued by a resume, readable without this package.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.utils.errors import UserError
from moss_train.utils.files import add_path_to_error, atomic_write

TABLES = ("metrics", "codebooks", "audio_hours", "validation")
"""A row per update; use of every codebook level; hours by domain; scores on held-out audio. `update` is in each."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ClipSample:
    """What the model made of one held-out clip, as files."""

    update: int
    name: str  # of the clip, fit for file names
    audio: Mapping[str, Path]  # "original", "levels-32", ... -> FLAC
    picture: Path | None  # spectrograms; None without matplotlib
    texts: Mapping[str, str]  # "truth", "levels-32", ...; empty for a clip without text


class Writer:
    """Something that keeps a log; each one takes what it can show."""

    def start(self, update: int) -> None:
        """Begin, or go on after `update`: what is written about later updates is about to be written again."""

    def write(self, table: str, row: Row) -> None:
        """Take a row of one of TABLES."""

    def show(self, samples: Sequence[ClipSample]) -> None:
        """Take samples, all of one update."""

    def close(self) -> None:
        """Finish; it may be called again."""


class LoggerCollection:
    """The writers of the process that writes, rank 0. On other ranks it takes everything and does nothing."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = tuple(writers)

    def start(self, update: int, *, is_main: bool) -> None:
        """See `Writer`."""
        if not is_main:
            self.writers = ()
        for writer in self.writers:
            writer.start(update)

    def write(self, table: str, row: Row) -> None:
        """See `Writer`."""
        assert table in TABLES, table
        for writer in self.writers:
            writer.write(table, row)

    def show(self, samples: Sequence[ClipSample]) -> None:
        """See `Writer`."""
        for writer in self.writers:
            writer.show(samples)

    def close(self) -> None:
        """See `Writer`."""
        for writer in self.writers:
            writer.close()


class CsvWriter(Writer):
    """One table, floats to the last bit; a resumed run goes on below its checkpoint.

    Args:
        path: of the file; its stem names the table.
        columns: of a new file. An existing one keeps its own and gets those that it lacks.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)

    def start(self, update: int) -> None:
        """Open the file, without rows of updates that are about to be done again."""
        known = next((list(row) for row in iterate_table(self.path)), [])
        columns = [*known, *(name for name in self.columns if name not in known)]
        with atomic_write(self.path) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(row for row in iterate_table(self.path) if int(row["update"]) <= update)
        self.file = self.path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, columns, restval="")

    def write(self, table: str, row: Row) -> None:
        """Append and flush: a kill loses nothing."""
        if table == self.path.stem:
            with add_path_to_error(self.path):
                self.writer.writerow(row)
                self.file.flush()

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "file"):
            with add_path_to_error(self.path):  # a full disk again, when a row is left over
                self.file.close()


def iterate_table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a table, one at a time; none when there is no file, and no row that a kill cut short.

    Raises:
        UserError: it is not a table of a run.
    """
    if not path.exists():
        return
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(line for line in file if line.endswith("\n"))
            if rows.fieldnames and "update" not in rows.fieldnames:
                raise UserError(f"{path} is damaged: it has no column update; restore it, or move it away")
            yield from (row for row in rows if (row["update"] or "").isdigit())
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or move it away") from error


def read_table(path: Path) -> list[dict[str, str]]:
    """All rows of a table, see `iterate_table`."""
    return list(iterate_table(path))


def column(rows: Iterable[dict[str, str]], name: str) -> list[float]:
    """One column as numbers, without rows in which it does not apply."""
    return [float(row[name]) for row in rows if row[name]]
