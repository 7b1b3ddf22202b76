"""Build the callbacks of a run from its configuration."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from lightning.pytorch import Callback

from moss_train.config.build import build
from moss_train.config.fit_schema import FitConfig
from moss_train.config.section import present_column
from moss_train.data.stream.sample_reader import StreamCounter
from moss_train.data.stream.stream import AudioStream
from moss_train.evaluation.metrics.base import split_available
from moss_train.evaluation.metrics.codes import codebook_columns
from moss_train.evaluation.metrics.registry import build_metrics
from moss_train.training.callbacks.checkpoint import BestCheckpointWriter, CheckpointWriter, check_metric
from moss_train.training.callbacks.health import HealthMonitor
from moss_train.training.callbacks.metrics import DataMonitor, StepTimer, UpdateMetrics, metric_columns
from moss_train.training.callbacks.quantizer import FIT_CLIPS, FIT_SECONDS, CodebookMetrics, QuantizerFit
from moss_train.training.callbacks.run_records import EnvironmentLogger, SkippedUpdateLogger, StartupMessages
from moss_train.training.callbacks.samples import AudioSampleWriter
from moss_train.training.callbacks.summary import Summary
from moss_train.training.callbacks.validation import Validation, ValidationPlan
from moss_train.training.callbacks.validation_data import HeldOutClip, depths, load_held_out
from moss_train.training.cost.mfu import Utilization
from moss_train.training.loggers.base import CsvWriter, LoggerCollection, ProgressWriter, TensorBoardWriter, Writer
from moss_train.training.loggers.wandb import WandbWriter
from moss_train.training.step.objective import Objective
from moss_train.utils.errors import UserError

Part = TypeVar("Part")
KEYS = frozenset({"wandb", "tensorboard", "callbacks", "loggers", "logging", "validation", "health"})
"""What of a run's configuration is about watching it, and changes nothing of what is learned."""

NO_VALIDATION = "no validation: give held-out audio as validation.data=<packed folders, folder or manifest>"
NO_PICTURES = 'samples come without spectrograms: matplotlib is not installed (pip install "moss_train[eval]")'


def build_callbacks(
    config: FitConfig,
    train: Sequence[str],
    held_out: Sequence[str],
    directory: Path,
    last: int,
    stream: AudioStream,
    num_quantizers: int,
    codebook_size: int,
    objective: Objective,
) -> list[Callback]:
    """The callbacks of a run, in their order: a checkpoint never lies behind an update that was not logged.

    Args:
        config: of the run.
        train: packed folders to learn from.
        held_out: those of validation without `validation.data`.
        directory: of the run.
        last: update at which it ends.
        stream: of the training data.
        num_quantizers: levels of the model.
        codebook_size: codes per level.
        objective: of the run, for the names of its losses.

    Raises:
        UserError: a setting that cannot work.
    """
    notices: list[str] = []
    plan = plan_validation(config, stream, num_quantizers, notices, held_out)
    tables = {
        "metrics": metric_columns(objective),
        "codebooks": codebook_columns(num_quantizers),
        "audio_hours": ("update", *stream.domains),
        **({} if plan is None else {"validation": plan.columns}),
    }
    writers = build_writers(config, directory, last, tables)
    run_log = LoggerCollection([*writers, HealthMonitor(directory, config.health, codebook_size)])
    counter = StreamCounter(stream.clip_format.sampling_rate, max_invalid_fraction=config.data.max_invalid_fraction)
    window = config.logging.window_updates
    clock = StepTimer()
    checkpoints = CheckpointWriter(
        directory / "checkpoints",
        config.checkpoint.every_updates,
        config.checkpoint.keep_last,
        config.checkpoint.keep_every_updates,
        clock,
    )
    return [
        StartupMessages(notices),
        EnvironmentLogger(directory),
        SkippedUpdateLogger(directory),
        UpdateMetrics(run_log, clock, Utilization(config)),
        DataMonitor(counter, stream.domains, run_log, window),
        CodebookMetrics(run_log, window),
        build_fit(train, stream),
        *([] if plan is None else [build_validation(config, directory, stream, plan, run_log, checkpoints)]),
        *build_own(config, "callbacks", Callback),
        checkpoints,
        Summary(directory, counter),
        clock,
    ]


def build_writers(config: FitConfig, directory: Path, last: int, tables: Mapping[str, Sequence[str]]) -> list[Writer]:
    """CSV files and the progress bar always, Weights & Biases, TensorBoard and the user's own as configured."""
    writers: list[Writer] = [CsvWriter(directory / f"{name}.csv", columns) for name, columns in tables.items()]
    writers.append(ProgressWriter(last))
    every_updates = config.logging.every_updates
    if config.tensorboard:
        writers.append(TensorBoardWriter(directory / "tensorboard", every_updates))
    if config.wandb is not None:
        writers.append(WandbWriter(directory, config.wandb, every_updates, config.to_plain()))
    return [*writers, *build_own(config, "loggers", Writer)]


def build_own(config: FitConfig, key: str, kind: type[Part]) -> list[Part]:
    """Build the user's nodes under a key. Raises UserError for one that is of another kind."""
    nodes = getattr(config, key)
    parts = [build(node, path=f"{key}.{number}") for number, node in enumerate(nodes)]
    for node, part in zip(nodes, parts, strict=True):
        if not isinstance(part, kind):
            raise UserError(f"{key}: {node['_target_']} is no subclass of {kind.__module__}.{kind.__name__}")
    return parts


def plan_validation(
    config: FitConfig,
    stream: AudioStream,
    num_quantizers: int,
    notices: list[str],
    held_out: Sequence[str] = (),
) -> ValidationPlan | None:
    """Read the held-out clips and choose the measures; None without held-out audio, which is a notice then."""
    settings = config.validation
    data = settings.data or list(held_out)
    if not data:
        notices.append(NO_VALIDATION)
        return None
    levels = settings.num_quantizers
    if levels is not None and max(levels, default=0) > num_quantizers:
        raise UserError(f"validation.num_quantizers={levels}: the model has levels 1 to {num_quantizers}")
    metrics, missing = split_available(build_metrics(settings.metrics, "validation.metrics"))
    notices += [f"validation without {name}: {reason}" for name, reason in missing.items()]
    if settings.samples_clips and find_spec("matplotlib") is None:
        notices.append(NO_PICTURES)
    clips = load_held_out(
        data,
        stream.clip_format,
        max_clips=settings.max_clips,
        max_seconds=config.data.max_seconds,
    )
    return ValidationPlan(
        clips, depths(num_quantizers, levels), settings.every_updates, metrics, settings.metrics_clips
    )


def build_fit(sources: Sequence[str], stream: AudioStream) -> QuantizerFit:
    """Build what fits the quantizer; the training clips are read when they are needed."""

    def clips() -> list[HeldOutClip]:
        # Source by source: the same recordings may be in two of them, with and without their text.
        return [
            clip
            for source in sources
            for clip in load_held_out(
                [source], stream.clip_format, max_clips=-(-FIT_CLIPS // len(sources)), max_seconds=FIT_SECONDS
            )
        ]

    return QuantizerFit(clips)


def build_validation(
    config: FitConfig,
    directory: Path,
    stream: AudioStream,
    plan: ValidationPlan,
    run_log: LoggerCollection,
    checkpoints: CheckpointWriter,
) -> Validation:
    """The validation with the writers of its best checkpoint and of its samples, each where it is wanted."""
    settings, metric = config.validation, config.checkpoint.monitor and present_column(config.checkpoint.monitor)
    best_checkpoint = samples_writer = None
    if metric is not None:
        check_metric(metric, plan.columns)
        best_checkpoint = BestCheckpointWriter(checkpoints.directory, metric, plan.higher, checkpoints.save_now)
    if settings.samples_clips is not None:
        samples_writer = AudioSampleWriter(
            directory / "samples",
            plan.clips[: settings.samples_clips],
            plan.levels[1:] or plan.levels,
            stream.clip_format.stored_rate,
            settings.samples_every_updates,
        )
    return Validation(run_log, plan, best_checkpoint, samples_writer)
