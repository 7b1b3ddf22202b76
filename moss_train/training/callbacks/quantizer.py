"""Fit the quantizer to training clips after a stage without it."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train.data.stream.stream import ClipFormat
from moss_train.training.callbacks.validation_data import load_held_out
from moss_train.training.module import cat_module
from moss_train.training.step.quantizer_start import fit_quantizer
from moss_train.training.step.schedule import Schedule

FIT_CLIPS = 300
FIT_SECONDS = 10.0
"""How much of the training data the fit looks at."""


class QuantizerFit(Callback):
    """Fits the levels at the updates of `fit_updates`; the same clips and weights give the same codes after a resume.

    Every rank fits the same clips, then takes over what the first one found.

    Args:
        sources: packed folders with the training clips, which are read when they are needed.
        clip_format: in which they are read.
    """

    def __init__(self, sources: Sequence[str], clip_format: ClipFormat) -> None:
        self.sources = sources
        self.clip_format = clip_format

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        module = cat_module(pl_module)
        if module.update not in fit_updates(module.schedule):
            return
        count = -(-FIT_CLIPS // len(self.sources))
        latents = []
        for source in self.sources:  # the same recordings may be in two of them, with and without their text
            for clip in load_held_out([source], self.clip_format, max_clips=count, max_seconds=FIT_SECONDS):
                latents.append(module.tokenizer.encode_latent(clip.audio[None].to(module.device))[0])
        left = fit_quantizer(module.tokenizer.quantizer, torch.cat(latents))[-1]
        for tensor in (*module.tokenizer.quantizer.parameters(), *module.tokenizer.quantizer.buffers()):
            tensor.data.copy_(trainer.strategy.broadcast(tensor.data))
        if module.average is not None:
            module.average.start(module.tokenizer)
        if trainer.is_global_zero:
            print(f"quantizer fitted, {left:.0%} of the latent's variance is left after all levels", file=sys.stderr)


def fit_updates(schedule: Schedule) -> set[int]:
    """Return the updates (from 0) before which the levels are fitted."""
    stages = schedule.stages
    pairs = zip(stages, stages[1:], schedule.ends, strict=False)
    return {end for before, after, end in pairs if after.quantize and not before.quantize}
