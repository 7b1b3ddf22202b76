"""Build the callbacks of a run from its configuration."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Callback

from moss_train.config.build import build
from moss_train.config.fit_schema import FitConfig
from moss_train.config.old_names import present_column
from moss_train.data.stream.sample_reader import StreamCounter
from moss_train.data.stream.stream import AudioStream
from moss_train.evaluation.metrics.base import split_available
from moss_train.evaluation.metrics.codes import codebook_columns
from moss_train.evaluation.metrics.registry import build_metrics
from moss_train.training.callbacks.checkpoint import CheckpointWriter
from moss_train.training.callbacks.health import HealthMonitor
from moss_train.training.callbacks.metrics import StepTimer, UpdateMetrics, metric_columns
from moss_train.training.callbacks.quantizer import QuantizerFit
from moss_train.training.callbacks.run_records import RunRecords, StartupMessages
from moss_train.training.callbacks.samples import AudioSampleWriter
from moss_train.training.callbacks.summary import Summary
from moss_train.training.callbacks.validation import Validation, ValidationPlan
from moss_train.training.callbacks.validation_data import depths, load_held_out
from moss_train.training.cost.mfu import Utilization
from moss_train.training.loggers.base import CsvWriter, LoggerCollection, ProgressWriter, TensorBoardWriter, Writer
from moss_train.training.loggers.wandb import WandbWriter
from moss_train.training.step.objective import Objective
from moss_train.utils.errors import UserError

Part = TypeVar("Part")
KEYS = frozenset({"wandb", "tensorboard", "callbacks", "loggers", "logging", "validation", "health"})
"""Configuration keys for monitoring a run, which do not affect what is learned."""


def build_callbacks(
    config: FitConfig,
    held_out: Sequence[str],
    last: int,
    stream: AudioStream,
    num_quantizers: int,
    codebook_size: int,
    objective: Objective,
    num_kept_levels: int | None,
) -> list[Callback]:
    """Return the callbacks of a run in their order: an update is logged before its checkpoint is written.

    Args:
        held_out: packed folders to validate on if `validation.data` is not set.
        last: update at which the run ends.
        objective: objective of the run, for the names of its losses.
        num_kept_levels: number of levels that come from `init`, None without it.

    Raises:
        UserError: a setting is invalid.
    """
    directory = Path(config.run_dir)
    plan, notices = plan_validation(config, stream, num_quantizers, held_out)
    tables = {
        "metrics": metric_columns(objective),
        "codebooks": codebook_columns(num_quantizers),
        "audio_hours": ("update", *stream.domains),
        **({} if plan is None else {"validation": plan.columns}),
    }
    writers: list[Writer] = [CsvWriter(directory / f"{name}.csv", columns) for name, columns in tables.items()]
    writers.append(ProgressWriter(last))
    every_updates = config.logging.every_updates
    if config.tensorboard:
        writers.append(TensorBoardWriter(directory / "tensorboard", every_updates))
    if config.wandb is not None:
        writers.append(WandbWriter(directory, config.wandb, every_updates, config.to_plain()))
    writers += [*build_own(config, "loggers", Writer), HealthMonitor(directory, config.health, codebook_size)]
    run_log = LoggerCollection(writers)
    counter = StreamCounter(stream.clip_format.sampling_rate, max_invalid_fraction=config.data.max_invalid_fraction)
    clock = StepTimer()
    checkpoints = CheckpointWriter(directory / "checkpoints", config.checkpoint, clock)
    validation = []
    if plan is not None:
        settings, samples_writer = config.validation, None
        if settings.samples_clips is not None:
            samples_writer = AudioSampleWriter(
                directory / "samples",
                plan.clips[: settings.samples_clips],
                plan.levels[1:] or plan.levels,
                stream.clip_format.stored_rate,
                settings.samples_every_updates,
                settings.every_updates,
            )
        validation = [Validation(run_log, plan, checkpoints, samples_writer)]
    return [
        StartupMessages(notices),
        RunRecords(directory),
        UpdateMetrics(run_log, clock, Utilization(config), counter, stream.domains, config.logging.window_updates),
        QuantizerFit(stream, num_kept_levels),
        *validation,
        *build_own(config, "callbacks", Callback),
        checkpoints,
        Summary(directory, counter),
        clock,
    ]


def build_own(config: FitConfig, key: str, kind: type[Part]) -> list[Part]:
    """Build the user's configuration nodes under `key`. Raises UserError for an object that is not a `kind`."""
    nodes = getattr(config, key)
    parts = [build(node, path=f"{key}.{number}") for number, node in enumerate(nodes)]
    for node, part in zip(nodes, parts, strict=True):
        if not isinstance(part, kind):
            raise UserError(f"{key}: {node['_target_']} is no subclass of {kind.__module__}.{kind.__name__}")
    return parts


def plan_validation(
    config: FitConfig, stream: AudioStream, num_quantizers: int, held_out: Sequence[str]
) -> tuple[ValidationPlan | None, list[str]]:
    """Read the held-out clips and choose the metrics; None without held-out audio. Also returns notices to print."""
    settings = config.validation
    data = settings.data or list(held_out)
    if not data:
        return None, ["no validation: give held-out audio as validation.data=<packed folders, folder or manifest>"]
    levels = settings.num_quantizers
    if levels is not None and max(levels, default=0) > num_quantizers:
        raise UserError(f"validation.num_quantizers={levels}: the model has levels 1 to {num_quantizers}")
    metrics, missing = split_available(build_metrics(settings.metrics, "validation.metrics"))
    notices = [f"validation without {name}: {reason}" for name, reason in missing.items()]
    if settings.samples_clips and find_spec("matplotlib") is None:
        notices.append(
            'samples come without spectrograms: matplotlib is not installed (pip install "moss_train[eval]")'
        )
    seconds, chosen = config.data.max_seconds, depths(num_quantizers, levels)
    clips = load_held_out(data, stream.clip_format, max_clips=settings.max_clips, max_seconds=seconds)
    monitor = config.checkpoint.monitor and present_column(config.checkpoint.monitor)
    plan = ValidationPlan(clips, chosen, settings.every_updates, metrics, settings.metrics_clips, monitor)
    if monitor is not None and monitor not in (scores := plan.columns[2:]):
        raise UserError(f"checkpoint.monitor={monitor} is no score of the validation, which has {', '.join(scores)}")
    return plan, notices
