"""What makes the same training faster or smaller, applied to a module from outside: no weight changes its name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import nn

from moss_train.model import MossAudioTokenizerModel
from moss_train.model.transformer import ProjectedTransformer
from moss_train.training.module import CatModule, stages_of
from moss_train.training.run.trainer import REDUCE_DTYPES
from moss_train.training.step.ema import WeightAverage
from moss_train.utils.errors import UserError


def prepare(module: CatModule, config: Mapping[str, Any]) -> None:
    """Apply the `ema` and the `trainer` options of a run to its module."""
    settings = config["trainer"]
    module.shares_every_updates = config["logging"]["gradient_shares_every_updates"]
    module.reduce_dtype = REDUCE_DTYPES[settings["reduce_dtype"]]
    if config["ema"] is not None:
        module.average = WeightAverage(**config["ema"])
    checkpoint_activations(module.tokenizer, settings["activation_checkpointing"])
    if settings["compile"]:
        compile_blocks(module, "inductor" if settings["compile"] is True else settings["compile"])


def checkpoint_activations(model: MossAudioTokenizerModel, frame_rates: Sequence[float]) -> None:
    """Keep only the inputs of the blocks in the stages of these frame rates (Hz), and compute the rest again backwards.

    The stages of high rates hold most activations. It costs one more forward of those stages.

    Raises:
        UserError: no stage has such a rate.
    """
    rates = {rate_of(model, stage) for stage in stages_of(model)}
    if unknown := set(frame_rates) - rates:
        raise UserError(
            f"trainer.activation_checkpointing: no stage runs at {sorted(unknown)} Hz, there are {sorted(rates)}"
        )
    for stage in stages_of(model):
        stage.transformer.gradient_checkpointing = rate_of(model, stage) in frame_rates


def rate_of(model: MossAudioTokenizerModel, stage: ProjectedTransformer) -> float:
    """Frames per second of a stage."""
    return model.config.frame_rate * stage.frames_per_code_frame


def compile_blocks(module: CatModule, backend: str = "inductor") -> None:
    """Compile block by block and discriminator by discriminator: equal blocks share one graph, and names stay.

    The whole step would neither compile in reasonable time nor as one graph.

    Raises:
        UserError: torch has no such backend.
    """
    if backend not in (known := torch._dynamo.list_backends(exclude_tags=None)):
        raise UserError(f"trainer.compile={backend}: torch has the backends {', '.join(known)}")
    # The discriminators' graph serves two backward passes; a compiler that reuses its buffers allows only one.
    torch._functorch.config.donated_buffer = False
    for block in compiled_parts(module):
        block.compile(backend=backend)


def compiled_parts(module: CatModule) -> list[nn.Module]:
    """Transformer blocks of the tokenizer and of the text LM, and sub-discriminators."""
    blocks = [layer for stage in stages_of(module.tokenizer) for layer in stage.transformer.layers]
    if module.semantic is not None:
        blocks += list(getattr(module.semantic.language_model.model, "layers", []))
    if module.discriminators is not None:
        blocks += list(module.discriminators.discriminators)
    return blocks
