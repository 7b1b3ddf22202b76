"""Decide what a run starts with: its architecture, and its weights when `init` names a model."""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moss_train.config.fit_schema import FitConfig
from moss_train.config.recipe_schema import ObjectiveConfig
from moss_train.config.section import to_plain
from moss_train.export.load import NETWORKS, ModelSource, open_source, tokenizer_config
from moss_train.training.module import CatModule
from moss_train.training.run.resize_model import (
    WeightReport,
    adapt_config,
    load_matching_weights,
    resampled_projections,
)
from moss_train.utils.checkpoint import list_checkpoints
from moss_train.utils.errors import UserError
from moss_train.utils.files import atomic_write, printable, read_json

Node = Mapping[str, Any]
RECORD_FILE = "initialization.json"
SHOWN_NAMES = 4  # number of weights shown by name in a list


@dataclass(frozen=True)
class InitPlan:
    """How the module of a run is built, and where its weights come from.

    Attributes:
        arguments: arguments of `CatModule`, plain data.
        source: model to load weights from; None when training from scratch or resuming from a checkpoint.
        new_networks: networks that `init` does not have, or that `restore` leaves out.
        num_kept_levels: number of levels of the quantizer that come from `init`; None without `init`.
    """

    arguments: dict[str, Any]
    source: ModelSource | None = None
    new_networks: tuple[str, ...] = ()
    num_kept_levels: int | None = None

    @property
    def tokenizer_config(self) -> Any:
        """Architecture of the tokenizer; `plan_initialization` has reported any error in it."""
        return tokenizer_config(self.arguments["tokenizer"])


def plan_initialization(config: FitConfig, directory: Path | None = None) -> InitPlan:
    """Decide on the architecture of a `fit` configuration; nothing is built yet.

    With `init`, a network configured as null or [] is left out. Any other network is that of `init` if `init` has it
    and `restore` names it, and is built as configured otherwise. A text LM that would have no effect is left out, with
    a warning.

    Args:
        directory: run directory; if the run has a checkpoint, its architecture is read from its record, so that `init`
            need not exist any more.

    Raises:
        UserError: the architecture is missing or invalid, or changes something that is fixed by `init`.
    """
    networks: dict[str, Any] = {"semantic": config.semantic, "discriminators": config.discriminators}
    if config.init is None:
        if config.tokenizer is None or config.tokenizer.stages is None:
            raise UserError("tokenizer has no stages and init is null: choose an experiment, or give init=<model>")
        node = config.tokenizer.to_plain()
        try:
            tokenizer_config(node)
        except (TypeError, ValueError) as error:
            raise UserError(f"tokenizer: {error}") from error
        return InitPlan(complete_arguments(config, node, networks, ()))
    # A record without a checkpoint was left by a run that was killed before it saved any weights.
    has_begun = directory is not None and list_checkpoints(directory / "checkpoints")
    if directory is not None and has_begun and (directory / RECORD_FILE).exists():
        record = read_json(directory / RECORD_FILE)
        networks = {name: record[name] for name in NETWORKS}
        new = record.get("new_networks", record.get("fresh"))
        return InitPlan(
            complete_arguments(config, record["tokenizer"], networks, new),
            num_kept_levels=record.get("num_kept_levels"),
        )
    changes = {} if config.tokenizer is None else config.tokenizer.to_plain()
    source = open_source(config.init)
    tokenizer = plain(adapt_config(source.tokenizer, changes).to_dict())
    trained = {part for stage in config.stages for part in stage.trainable or config.trainable}
    if networks["semantic"] and not {"encoder", "quantizer", "semantic"} & trained:
        networks["semantic"] = None
        warnings.warn(
            f"trainable={list(config.trainable)}: encoder and quantizer are not trained, so the text LM has no "
            "effect and is not built (trainable=[decoder,semantic] would train the LM itself)",
            stacklevel=2,
        )
    new = []
    for name in NETWORKS:
        if networks[name] and name in config.restore and name in source.nodes:
            networks[name] = source.nodes[name]
        elif networks[name]:
            new.append(name)
    is_restored = networks["discriminators"] and "discriminators" not in new
    if is_restored and any(stage.adversarial for stage in config.stages):
        warn_of_other_input(source, config)
    arguments = complete_arguments(config, tokenizer, networks, new)
    return InitPlan(arguments, source, tuple(new), source.tokenizer.num_quantizers)


def warn_of_other_input(source: ModelSource, config: FitConfig) -> None:
    """Warn if the restored discriminators were trained on crops that were prepared in another way."""
    defaults = ObjectiveConfig().to_plain()
    configured = config.objective.to_plain()
    for key in ("discriminator_pre_emphasis", "discriminator_unit_rms"):
        theirs = source.objective.get(key, defaults[key])  # runs of older versions do not state it
        if source.objective and theirs != configured[key]:
            warnings.warn(
                f"the discriminators of init={source.path} were trained with objective.{key}={theirs} and now get "
                f"input with {configured[key]}: set it as it was, or train new ones with restore=[semantic]",
                stacklevel=3,
            )


def complete_arguments(
    config: FitConfig, tokenizer: Node, networks: Mapping[str, Any], new: Sequence[str]
) -> dict[str, Any]:
    """Return the arguments of `CatModule`: the architecture, and the rest as configured.

    A mid/side weight of null becomes 1 for stereo and 0 otherwise. The run's `trainable` applies to stages that do not
    name their own parts. New networks get a warm-up of at least `new_module_warmup_updates`, during which they learn
    without influence on the others: discriminators in the first adversarial stage, the text LM in the first stage, not
    counting stages without updates.

    Raises:
        UserError: a mid/side weight is set, in the objective or in a stage, but there are not two channels.
    """
    channels = tokenizer_config(tokenizer).number_channels
    discriminators = []
    for node in networks["discriminators"] or ():  # for mono, nodes do not state the number of channels
        others = {key: value for key, value in node.items() if key != "num_channels"}
        discriminators.append(others if channels == 1 else {**others, "num_channels": channels})
    weights = dict(config.objective.weights)  # without those of losses that are taken away
    if "mid_side" in weights and weights["mid_side"] is None:
        weights["mid_side"] = float(channels == 2)
    places = {f"stages.{number}.weights": stage.weights for number, stage in enumerate(config.stages)}
    for place, given in ({"objective.weights": weights} | places).items():
        if given.get("mid_side") and channels != 2:
            raise UserError(f"{place}.mid_side={given['mid_side']} needs two channels, the tokenizer has {channels}")
    stages = [stage.to_plain() | {"trainable": stage.trainable or config.trainable} for stage in config.stages]
    used = [stage for stage in stages if stage["updates"]]
    warmups = {
        "discriminators": ("discriminator_warmup_updates", [stage for stage in used if stage["adversarial"]]),
        "semantic": ("semantic_warmup_updates", used),
    }
    for name in new:
        key, concerned = warmups[name]
        for stage in concerned[:1]:
            stage[key] = max(stage.get(key, 0), config.new_module_warmup_updates)
    arguments = {
        "tokenizer": tokenizer,
        "semantic": networks["semantic"],
        "discriminators": discriminators,
        "stages": stages,
        "objective": config.objective.replace(weights=weights),
        "optimizers": config.optimizers,
        "seed": config.seed,
        "max_skipped_updates": config.max_skipped_updates,
    }
    return to_plain(arguments)


def without_text(init_plan: InitPlan) -> InitPlan:
    """Return the plan for data in which no clip has a text that is used: with `init` without the text LM, otherwise
    unchanged. Warns if there is a text LM.
    """
    if init_plan.arguments["semantic"] is None:
        return init_plan
    if init_plan.source is None:
        warnings.warn(
            "no clip has a text that is used, so the text LM learns nothing; semantic=null saves its memory",
            stacklevel=2,
        )
        return init_plan
    warnings.warn("no clip has a text that is used: the text LM is not built", stacklevel=2)
    new = tuple(name for name in init_plan.new_networks if name != "semantic")
    return replace(init_plan, arguments=init_plan.arguments | {"semantic": None}, new_networks=new)


def initialize(module: CatModule, init_plan: InitPlan) -> dict[str, WeightReport]:
    """Load the weights of `init` into a new module and return a report for each network.

    Raises:
        UserError: the architecture is that of `init`, but weights are missing or left over.
    """
    assert init_plan.source is not None
    weights = init_plan.source.load()
    old, new = init_plan.source.tokenizer, init_plan.tokenizer_config
    made = resampled_projections(old, new, weights["tokenizer"])
    reports = {"tokenizer": load_matching_weights(module.tokenizer, weights["tokenizer"], made)}
    for name in NETWORKS:
        part, own = getattr(module, name), weights.get(name, {})
        if part is None:
            reports[name] = WeightReport(unused=tuple(own))
        else:
            reports[name] = load_matching_weights(part, {} if name in init_plan.new_networks else own)
    report = reports["tokenizer"]
    if plain(old.to_dict()) == plain(new.to_dict()) and (report.new or report.unused):
        raise UserError(
            f"init={init_plan.source.path}: the weights do not fit the architecture; missing: "
            f"{shown_names(report.new)}; unused: {shown_names(report.unused)}"
        )
    return reports


def store_record(directory: Path, init_plan: InitPlan, reports: Mapping[str, WeightReport]) -> None:
    """Write a record of what the run starts from, so that it can resume without `init`."""
    names = ("tokenizer", *NETWORKS)
    record = {
        "init": None if init_plan.source is None else init_plan.source.path,
        **{name: plain(init_plan.arguments[name]) for name in names},
        "new_networks": list(init_plan.new_networks),
        "num_kept_levels": init_plan.num_kept_levels,
        "weights": {name: asdict(report) for name, report in reports.items()},
    }
    with atomic_write(directory / RECORD_FILE) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def print_reports(init_plan: InitPlan, reports: Mapping[str, WeightReport], warmup_updates: int) -> None:
    """Print a table of the weights that came from `init` or did not; warns about newly initialised networks.

    If only some weights of a network were loaded, the others are listed by name.
    """
    assert init_plan.source is not None
    kinds = [field.name for field in fields(WeightReport)]
    table = Table("", *kinds, title=Text(printable(f"weights from {init_plan.source.path}")))
    for name, report in reports.items():
        table.add_row(name, *(f"{len(getattr(report, kind))}" for kind in kinds))
    Console(file=sys.stderr, soft_wrap=False).print(table)
    for name, report in reports.items():
        others = tuple(name for name in report.unused if name not in report.new)
        for kind, names in (("resampled", report.resampled), ("new", report.new), ("unused", others)):
            if names and report.loaded:
                print(printable(f"{name}, {kind}: {shown_names(names)}"), file=sys.stderr)
    for name in init_plan.new_networks:
        reason = "restore leaves out what init has" if name in init_plan.source.nodes else "init has none"
        warnings.warn(
            f"{name} newly initialised, {reason}; warm-up of {warmup_updates} updates (new_module_warmup_updates)",
            stacklevel=2,
        )


def shown_names(names: Sequence[str]) -> str:
    """Return the first names and the number of the others, as text."""
    if not names:
        return "none"
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if (more := len(names) - SHOWN_NAMES) > 0 else "")


def plain(node: Any) -> Any:
    """Return plain containers and scalars, as a checkpoint stores them; other values, such as a dtype, become text."""
    if isinstance(node, Mapping):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [plain(value) for value in node]
    return node if node is None or isinstance(node, str | int | float | bool) else str(node).removeprefix("torch.")
