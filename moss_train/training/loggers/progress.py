"""Show the progress of a run as a bar, or as occasional lines without a terminal."""

import sys
import time
from contextlib import ExitStack

from moss_train.training.loggers.base import Row, Writer
from moss_train.utils.progress import progress

LINE_SECONDS = 600.0
"""Without a terminal, in a batch system's log, a line at most so often."""


class ProgressWriter(Writer):
    """Updates done, speed and time left, with the losses that matter most and the last validation."""

    def __init__(self, updates: int, line_seconds: float = LINE_SECONDS) -> None:
        self.updates = updates
        self.line_seconds = line_seconds
        self.stack = ExitStack()
        self.note = self.validation = ""

    def start(self, update: int) -> None:
        """Show the bar."""
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
        note = f"{row['stage']}: rec {row.get('loss/reconstruction', float('nan')):.3f}"
        if "loss/semantic" in row:
            note += f", sem {row['loss/semantic']:.2f}"
        if "loss/discriminators" in row:
            note += f", D {row['loss/discriminators']:.2f}"
        speed = row["audio_seconds_per_second"]
        self.note = f"{note}, {speed:.{0 if speed >= 10 else 2}f} audio-s/s"
        if "mfu" in row:
            self.note += f", MFU {row['mfu']:.1%}"
        self.task.advance(1, note=self.note + self.validation)
        self._print_line(row["update"])

    def _print_line(self, update: int) -> None:
        now = time.monotonic()
        if self.task.is_visible or now - self.last_line < self.line_seconds:
            return
        self.last_line = now
        seconds_left = (now - self.started) / (update - self.first_update) * (self.updates - update)
        left = clock(seconds_left)
        note = self.note + self.validation
        print(f"training: {update}/{self.updates} updates, {left} left, {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.stack.close()


def clock(seconds: float) -> str:
    """Seconds as hours and minutes, days in front where there are any."""
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days} d {hours:02d}:{minutes % 60:02d} h" if days else f"{hours}:{minutes % 60:02d} h"
