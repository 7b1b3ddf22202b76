"""Log to TensorBoard event files in the run directory, on request."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moss_train.audio.io import read_audio
from moss_train.training.loggers.base import ClipSample, Row, Writer
from moss_train.utils.errors import UserError


class TensorBoardWriter(Writer):
    """Every number as a scalar, samples as audio and text; `tensorboard --logdir <run directory>` shows them.

    Args:
        directory: of the event files.
        every_updates: updates per row of the metrics table; other tables are logged whole.

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
        """Open the next event file; what earlier ones say about later updates is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(self.directory), purge_step=update + 1)

    def write(self, table: str, row: Row) -> None:
        """Add one row."""
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
        """Close the event file."""
        if self.events is not None:
            self.events.close()
            self.events = None
