"""Everything that watches a run, put together from its configuration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from moss_train.data.counting import StreamCounter
from moss_train.data.stream import AudioStream
from moss_train.training.checkpointing import CheckpointWriter
from moss_train.training.codebook_metrics import CodebookMetrics, codebook_columns
from moss_train.training.csv_writer import CsvWriter
from moss_train.training.environment import EnvironmentRecord
from moss_train.training.metrics import COLUMNS, Clock, StreamWatch, UpdateMetrics
from moss_train.training.progress_writer import ProgressWriter
from moss_train.training.run_log import RunLog, Writer
from moss_train.training.tensorboard_writer import TensorBoardWriter
from moss_train.training.wandb_writer import MODES, WandbWriter
from moss_train.utils.errors import UserError

Node = Mapping[str, Any]
KEYS = frozenset({"wandb", "tensorboard", "logging"})
"""What of a run's configuration is about watching it, and changes nothing of what is learned."""


def build_observers(
    config: Node, directory: Path, last: int, stream: AudioStream, num_quantizers: int
) -> list[Callback]:
    """The callbacks of a run, in their order: a checkpoint never lies behind an update that was not logged.

    Args:
        config: of the run.
        directory: of the run.
        last: update at which it ends.
        stream: of the training data.
        num_quantizers: levels of the model.

    Raises:
        UserError: a setting that cannot work.
    """
    settings = config["logging"]
    for name, value in settings.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"logging.{name}={value} has to be a whole number from 1")
    log = RunLog(build_writers(config, directory, last, stream.domains, num_quantizers))
    counter = StreamCounter(stream.clip_format.sampling_rate, max_bad_share=config["data"]["max_bad_share"])
    clock = Clock()
    return [
        EnvironmentRecord(directory),
        UpdateMetrics(log, clock, settings["gradient_shares_every_updates"]),
        StreamWatch(counter, stream.domains, log, settings["window_updates"]),
        CodebookMetrics(log, settings["window_updates"]),
        CheckpointWriter(directory / "checkpoints", **config["checkpoint"]),
        clock,
    ]


def build_writers(
    config: Node, directory: Path, last: int, domains: tuple[str, ...], num_quantizers: int
) -> list[Writer]:
    """CSV files and the progress bar always, Weights & Biases and TensorBoard as configured."""
    writers: list[Writer] = [
        CsvWriter(directory / "metrics.csv", COLUMNS),
        CsvWriter(directory / "codebooks.csv", codebook_columns(num_quantizers)),
        CsvWriter(directory / "audio_hours.csv", ("update", *domains)),
        ProgressWriter(last),
    ]
    every_updates = config["logging"]["every_updates"]
    if config["tensorboard"]:
        writers.append(TensorBoardWriter(directory / "tensorboard", every_updates))
    if config["wandb"] not in (None, *MODES):
        raise UserError(f"wandb={config['wandb']} is not one of {', '.join(MODES)}, null")
    if config["wandb"] is not None:
        writers.append(WandbWriter(directory, config["wandb"], every_updates, dict(config)))
    return writers
