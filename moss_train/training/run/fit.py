"""Run a training from configuration to run directory; the same call again resumes it."""

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from moss_train.config.build import build
from moss_train.config.fit_schema import FitConfig
from moss_train.config.schema import PackConfig, check_inputs
from moss_train.config.section import known_keys
from moss_train.data.pack.on_the_fly import PackedSource, pack_cached
from moss_train.data.stream.loader import check_longest, make_loader
from moss_train.data.stream.stream import AudioStream, ClipFormat
from moss_train.export.load import NETWORKS
from moss_train.training.callbacks.build import KEYS as CALLBACK_KEYS
from moss_train.training.callbacks.build import build_callbacks
from moss_train.training.callbacks.checkpoint import read_progress
from moss_train.training.cost.hardware import StateSize, check_memory
from moss_train.training.module import CatModule
from moss_train.training.run.optimizations import apply_optimizations
from moss_train.training.run.preemption import PreemptionHandler, exit_after_preemption
from moss_train.training.run.trainer import build_trainer, choose_accelerator, start_processes, started_processes
from moss_train.training.run.warm_start import (
    RECORD_FILE,
    InitPlan,
    initialize,
    plan_initialization,
    print_reports,
    store_record,
    without_text,
)
from moss_train.training.step.objective import Objective
from moss_train.training.step.schedule import Schedule
from moss_train.utils.checkpoint import list_checkpoints, read_payload, resume_checkpoint
from moss_train.utils.errors import UserError
from moss_train.utils.files import atomic_write, file_lock, pluralize, printable, read_json, read_yaml, warn

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
LOCK_FILE = ".lock"
PACKED_FILE = "packed.json"  # records the folders into which `data.path` was packed
PACKED_FOLDER = "packed"
LOCK_TIMEOUT_SECONDS = 10.0  # for processes of a killed run that have not ended yet
LAUNCHED_LOCK_TIMEOUT_SECONDS = 180.0  # a file server may hold the lock of a dead machine for minutes
# Keys that may change when a run is resumed: they do not affect what is learned.
MUTABLE_KEYS = CALLBACK_KEYS | {
    "run_dir",
    "name",
    "max_updates",
    "trainer",
    "checkpoint",
    "allow_config_changes",
    "plugins",
}
MUTABLE_DATA_KEYS = {"num_workers", "max_invalid_fraction", "cache"}


@dataclass(frozen=True)
class RunResult:
    """Where a run stands when `fit` returns."""

    directory: Path
    update: int
    updates: int
    rank: int = 0


def fit(config: FitConfig | Mapping[str, Any]) -> RunResult:
    """Train, or continue training, the run that a `fit` configuration describes.

    Args:
        config: result of `moss_train.load_config("fit", [...])`; plain data is checked in the same way.

    Raises:
        UserError: something that the user has to change. Errors in the configuration, and too little memory, are found
            before the networks are allocated and before a checkpoint is written.
    """
    config = FitConfig.of(config)
    check_inputs(config)
    directory = Path(config.run_dir)
    if list_checkpoints(directory / "checkpoints"):
        check_unchanged(config, directory)
    init_plan = plan_initialization(config, directory)
    schedule = Schedule.from_config(init_plan.arguments["stages"])
    accelerator = choose_accelerator(config.trainer.accelerator)
    train_folders, held_out = find_data(config, init_plan.tokenizer_config, directory)
    has_lm = init_plan.arguments["semantic"] is not None
    stream = open_stream(config, init_plan.tokenizer_config, has_lm, train_folders)
    if not stream.num_with_text:
        init_plan = without_text(init_plan)
    size = count_parameters_on_meta(init_plan.arguments, config)
    last = schedule.updates if config.max_updates is None else min(config.max_updates, schedule.updates)
    quantizer = init_plan.tokenizer_config.quantizer_kwargs
    sizes = quantizer["num_quantizers"], quantizer["codebook_size"]
    objective = Objective(stream.clip_format.stored_rate, **init_plan.arguments["objective"])
    callbacks = build_callbacks(config, held_out, last, stream, *sizes, objective, init_plan.num_kept_levels)
    preemption = PreemptionHandler()
    trainer = build_trainer(config.trainer, accelerator, [preemption, *callbacks], config.checkpoint.background)
    shards = trainer.world_size if config.trainer.strategy == "fsdp" else 1
    check_memory(replace(size, shards=shards), trainer.strategy.root_device, trainer.num_devices)
    if trainer.is_global_zero:
        for path, stage in schedule.long_warmups.items():
            warn(
                f"{path} ({stage.name}): the learning rate rises for {min(stage.warmup_updates, stage.updates):,} of "
                f"{pluralize(stage.updates, 'update')}; set {path}.warmup_updates if that is not meant"
            )
    directory.mkdir(parents=True, exist_ok=True)
    patience = LAUNCHED_LOCK_TIMEOUT_SECONDS if started_processes() else LOCK_TIMEOUT_SECONDS
    with file_lock(directory / LOCK_FILE, str(directory), patience) if trainer.is_global_zero else nullcontext():
        checkpoint = None
        if trainer.is_global_zero:  # rank 0 looks before it starts the other ranks, and broadcasts what it found
            checkpoint = resume_checkpoint(directory / "checkpoints")
            if checkpoint is not None:
                check_unchanged(config, directory)
                check_networks(config, init_plan.arguments, directory, checkpoint)
            elif (directory / METRICS_FILE).exists():
                raise UserError(
                    f"{directory} has a {METRICS_FILE} but no checkpoints any more: put them back, or move the "
                    "directory away to start from scratch"
                )
            with atomic_write(directory / CONFIG_FILE) as temporary:
                temporary.write_text(yaml.safe_dump(config.to_plain(), sort_keys=False))
        start_processes(trainer)
        checkpoint = trainer.strategy.broadcast(checkpoint)
        update = read_progress(checkpoint)["update"]
        if checkpoint is None or update < last:
            update = train(config, checkpoint, init_plan, stream, trainer, range(update, last))
    if preemption.signal is not None:
        exit_after_preemption(preemption.signal, update, trainer)
    return RunResult(directory, update, schedule.updates, trainer.global_rank)


def train(
    config: FitConfig,
    checkpoint: Path | None,
    init_plan: InitPlan,
    stream: AudioStream,
    trainer: Trainer,
    updates: range,
) -> int:
    """Train for the given updates, from a checkpoint or from the start if there is none; returns the update reached."""
    module = CatModule(**init_plan.arguments)
    apply_optimizations(module, config)
    if checkpoint is None and init_plan.source is not None:
        reports = initialize(module, init_plan)
        if trainer.is_global_zero:
            print_reports(init_plan, reports, config.new_module_warmup_updates)
            store_record(Path(config.run_dir), init_plan, reports)
    loader = make_loader(
        stream,
        text_encoder=None if module.semantic is None else module.semantic.text,
        position=read_progress(checkpoint)["position"],
        updates=[(update, module.schedule.at(update).stage.batch_seconds) for update in updates],
        micro_batch_seconds=config.data.micro_batch_seconds,
        max_text_tokens=config.data.max_text_tokens,
        num_workers=config.data.num_workers,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        pin_memory=trainer.strategy.root_device.type == "cuda",
    )
    try:
        trainer.fit(module, loader, ckpt_path=None if checkpoint is None else str(checkpoint))
    except SystemExit:
        # Lightning turns Ctrl-C into a silent exit.
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    return module.update


def count_parameters_on_meta(arguments: dict[str, Any], config: FitConfig) -> StateSize:
    """Count a run's parameters on the meta device, where nothing is allocated; checks its other options there, too.

    Raises UserError for an option that does not work.
    """
    semantic = arguments["semantic"]
    try:
        with torch.device("meta"):
            module = CatModule(**arguments | {"semantic": None})
            apply_optimizations(module, config)
            module.configure_optimizers()
            latent_dim = module.tokenizer.config.quantizer_kwargs["output_dim"]
            is_small = semantic is not None and semantic.get("pretrained") is None
            text_lm = build(semantic, path="semantic", latent_dim=latent_dim) if is_small else None
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    parts = (module.tokenizer, text_lm, module.discriminators)
    tokenizer, lm, discriminators = (
        sum(p.numel() for p in part.parameters()) if part is not None else 0 for part in parts
    )
    return StateSize(tokenizer, lm, discriminators, has_average=config.ema is not None)


def find_data(config: FitConfig, tokenizer: Any, directory: Path) -> tuple[list[str], list[str]]:
    """Return the packed folders for training and those held out for validation (unless `validation.data` names others).

    They are those of `data.train`, or those into which `data.path` is packed here in the tokenizer's format. A resumed
    run keeps the shards that it started with, even if `data.path` no longer exists.

    Args:
        tokenizer: configuration of the tokenizer, for sampling rate and channels.
        directory: run directory.

    Raises:
        UserError: nothing can be packed, or the files changed since the run was started.
    """
    data = config.data
    if data.path is None:
        return data.train, []
    path, begun = directory / PACKED_FILE, None
    if path.exists() and list_checkpoints(directory / "checkpoints"):
        record = read_json(path)
        heldout = record["heldout"]
        begun = PackedSource(record["key"], Path(record["train"]), None if heldout is None else Path(heldout))
    if begun is not None and begun.train.exists() and not Path(data.path).exists():
        print(printable(f"data.path={data.path} is gone, continuing with {begun.train.parent}"), file=sys.stderr)
        packed = begun
    else:
        packed = pack_cached(
            PackConfig(
                data.path,
                str(directory / PACKED_FOLDER) if data.cache is None else data.cache,
                data.domain,
                sampling_rate=tokenizer.output_sampling_rate,
                num_channels=tokenizer.number_channels,
                max_invalid_fraction=data.max_invalid_fraction,
            ),
            data.heldout_fraction,
            key="data.path",
        )
        if begun is not None and begun.key != packed.key and not config.allow_config_changes:
            raise UserError(
                f"the files of data.path={data.path} are not those that {directory} was started with: use another "
                "name=, or allow_config_changes=true to continue with them"
            )
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(packed), indent=1, default=str) + "\n")
    if packed.is_silent:
        warn_of_silence(directory, data.path)
    return [str(packed.train)], [] if packed.heldout is None else [str(packed.heldout)]


def warn_of_silence(directory: Path, source: str) -> None:
    """Warn that there is nothing to learn, on stderr and in `warnings.txt`, which the summary of the run shows."""
    message = f"update 0: every clip of data.path={source} is digital silence: nothing can be learned from them"
    print(printable(f"warning: {message}"), file=sys.stderr)
    path = directory / "warnings.txt"
    if not path.exists() or message not in path.read_text("utf-8", errors="replace"):
        with path.open("a", encoding="utf-8") as file:
            file.write(message + "\n")


def open_stream(
    config: FitConfig, tokenizer: Any, uses_text: bool | None = None, train: list[str] | None = None
) -> AudioStream:
    """Open the training stream in the tokenizer's format; without a text LM, clips with text are cropped like others.

    Args:
        uses_text: whether the module has a text LM; None: whether one is configured.
        train: packed folders; None: `data.train`.
    """
    data = config.data
    train = data.train if train is None else train
    clip_format = ClipFormat(
        tokenizer.sampling_rate,
        tokenizer.number_channels,
        tokenizer.downsample_rate,
        peak=data.peak,
        loudness_lufs=data.loudness_lufs,
        gain_db=data.gain_db,
        output_sampling_rate=tokenizer.output_sampling_rate,
    )
    stream = AudioStream(
        train,
        clip_format,
        crop_seconds=data.crop_seconds,
        max_seconds=data.max_seconds,
        weights=data.weights,
        seed=config.seed,
        min_length_ratio=data.min_length_ratio,
        uses_text=config.semantic is not None if uses_text is None else uses_text,
    )
    check_longest(stream, data.micro_batch_seconds)
    return stream


NAMED_CHANGES = 6  # number of changed keys named in one message


def check_unchanged(config: FitConfig, directory: Path) -> None:
    """Raise UserError when a run began with another configuration, unless `allow_config_changes` is set."""
    path = directory / CONFIG_FILE
    if config.allow_config_changes or not path.exists():
        return
    begun = FitConfig.parse(known_keys(FitConfig, read_config(path)))
    if closed := [name for name in begun.plugins if name not in config.plugins]:
        raise UserError(
            f"{directory} was started with plugins=[{','.join(closed)}]: give it again, or use another name="
        )
    deciding = []  # the part of both configurations that affects what is learned
    for one in (begun, config):
        data = {key: value for key, value in one.data.to_plain().items() if key not in MUTABLE_DATA_KEYS}
        kept = {key: value for key, value in one.to_plain().items() if key not in MUTABLE_KEYS}
        deciding.append(kept | {"data": data})
    if changes := diff_config(deciding[0], deciding[1]):
        named = "; ".join(changes[:NAMED_CHANGES])
        further = f"; and {len(changes) - NAMED_CHANGES} more" if len(changes) > NAMED_CHANGES else ""
        raise UserError(
            f"{directory} was started with another configuration: {named}{further}. Use another name=, or "
            f"allow_config_changes=true to continue with the new values; the old ones are in {path}"
        )


def check_networks(config: FitConfig, arguments: dict[str, Any], directory: Path, checkpoint: Path) -> None:
    """Raise UserError when `allow_config_changes` would give a run that has begun other networks.

    The networks of a run with `init` are those of its record, whatever the configuration says; those of other runs
    have to fit the weights of the checkpoint.
    """
    path = directory / CONFIG_FILE
    if not config.allow_config_changes or not path.exists():
        return
    if (directory / RECORD_FILE).exists():
        begun = FitConfig.parse(known_keys(FitConfig, read_config(path))).to_plain()
        changes = [diff_config(begun[key], config.to_plain()[key], key) for key in ("tokenizer", "restore", *NETWORKS)]
        problems = [change for lines in changes for change in lines]
    else:
        problems = shape_differences(arguments, read_payload(checkpoint, mmap=True)["state_dict"])
    if problems:
        named = "; ".join(problems[:NAMED_CHANGES])
        further = f"; and {len(problems) - NAMED_CHANGES} more" if len(problems) > NAMED_CHANGES else ""
        raise UserError(
            f"{directory} has begun, and its networks cannot change any more: {named}{further}. Restore the old values "
            f"(in {path}), or start another run from its weights: init={directory} tokenizer=null name=<another>"
        )


def shape_differences(arguments: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the weights in which a module with these arguments differs from a checkpoint, as `name: old -> new`.

    Pretrained weights of a text LM are not read, so only its presence is compared.
    """
    semantic = arguments["semantic"]
    is_pretrained = semantic is not None and semantic.get("pretrained") is not None
    with torch.device("meta"):
        module = CatModule(**arguments | ({"semantic": None} if is_pretrained else {}))
    old: dict[str, Any] = {name: tuple(weight.shape) for name, weight in weights.items()}
    new: dict[str, Any] = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    if is_pretrained:
        others = {name: shape for name, shape in old.items() if not name.startswith("semantic.")}
        old = others if len(others) == len(old) else others | {"semantic": "pretrained"}
        new = new | {"semantic": "pretrained"}
    return diff_config(old, new)


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration that a run directory stores. Raises UserError when it is damaged."""
    try:
        config = read_yaml(path)
    except UserError as error:
        raise UserError(f"{error}; restore it, or remove it") from error
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise UserError(f"{path} is not the configuration of a run; restore it, or remove it")
    return config


def diff_config(old: Any, new: Any, path: str = "") -> list[str]:
    """Return every leaf in which two configurations differ, as `path: old -> new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in diff_config(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, pair in enumerate(zip(old, new, strict=True)) for line in diff_config(*pair, f"{path}[{i}]")
        ]
    return [] if old == new else [f"{path}: {old} -> {new}"]
