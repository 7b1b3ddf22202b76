"""Model FLOPs utilisation: operations of an update divided by what the devices could have done in that time.

MFU (model FLOPs utilisation) counts every operation once; HFU (hardware) also counts those that activation
checkpointing does a second time (arXiv 2204.02311). Both count what the clips need, not their padding.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import torch

from moss_train.config.fit_schema import FitConfig
from moss_train.semantic import with_config
from moss_train.training.cost.flops import StageCosts, semantic_cost, stage_costs
from moss_train.training.cost.hardware import device_peak, is_half
from moss_train.training.loggers.base import iterate_table
from moss_train.training.module import CatModule
from moss_train.training.step.schedule import ScheduleState
from moss_train.utils.errors import UserError
from moss_train.utils.files import warn

TEXT_LENGTH = 64  # the text LM is counted on clips of this many frames and tokens, and of twice as many


class Utilization:
    """Computes the utilisation of the devices per update; nothing if their peak is not known, as on a CPU."""

    def __init__(self, config: FitConfig) -> None:
        self.config = config
        self.peak: float | None = None
        self.stages: list[StageCosts] = []

    def start(self, module: CatModule, device: torch.device, num_devices: int) -> None:
        """Count the operations of the stages once, if the peak of the devices is known; takes seconds."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        peak = device_peak(name, self.config.trainer, self.config.logging.peak_tflops)
        if peak is None:
            return
        try:
            self.stages = count_stages(module, self.config)
        except UserError as error:
            warn(f"the log has no mfu: {error}")
            return
        self.peak = peak * num_devices

    def shares(self, content: Mapping[str, float], schedule_state: ScheduleState, seconds: float) -> dict[str, float]:
        """Return `mfu` and `hfu` of an update with this content (see `StageCosts.operations`) and duration."""
        if self.peak is None:
            return {}
        stage = next(costs for costs in self.stages if costs.stage == schedule_state.stage)  # names may repeat
        operations = stage.operations(content, schedule_state)
        recomputed = stage.codec_cost.recomputed * content["audio_seconds"]
        possible = self.peak * seconds
        return {"mfu": operations / possible, "hfu": (operations + recomputed) / possible}


def count_stages(module: CatModule, config: FitConfig) -> list[StageCosts]:
    """Count the operations of every stage. Raises UserError for a text LM that cannot be counted."""
    text = cache(lambda learns: text_operations(module, is_half(config.trainer), learns))
    nodes = module.hparams["discriminators"]
    counted = stage_costs(config, module.tokenizer.config, nodes, module.objective, module.schedule)
    return [replace(costs, text=text("semantic" in costs.stage.parts)) for costs in counted]


def text_operations(module: CatModule, half: bool, learns: bool) -> dict[str, float]:
    """Count the operations of the text LM (see `StageCosts.text`). Raises UserError if they cannot be counted."""
    if module.semantic is None:
        return {}
    node = module.hparams["semantic"]
    if node.get("pretrained") is not None:
        node = with_config(node, module.semantic.language_model.config)
    width = module.tokenizer.config.quantizer_kwargs["output_dim"]
    n = TEXT_LENGTH
    sizes = ((n, n), (2 * n, n), (n, 2 * n), (2 * n, 2 * n))
    counted = torch.tensor([semantic_cost(node, width, *size, half, learns).total for size in sizes]).double()
    equations = [[1.0, frames, tokens, (frames + tokens) ** 2] for frames, tokens in sizes]
    operations = torch.linalg.solve(torch.tensor(equations).double(), counted).tolist()
    return dict(zip(("clips_with_text", "text_frames", "text_tokens", "text_squares"), operations, strict=True))


def measured_share(directory: str | Path) -> float:
    """Return the median `hfu` of a run. Raises UserError for a folder that is not a run, or one whose peak was not
    known.
    """
    path = Path(directory) / "metrics.csv"
    if not path.exists():
        raise UserError(f"mfu={directory} is neither a number nor a run directory with a metrics.csv")
    values = [float(row["hfu"]) for row in iterate_table(path) if row.get("hfu")]
    if not values:
        raise UserError(
            f"mfu={directory}: its metrics.csv has no hfu (the peak of its device was not known); give a number"
        )
    return median(values)
