"""The logger interface: rows of a few tables and audio samples, handed to every logger."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
