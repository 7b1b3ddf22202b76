"""Fit the quantizer to training clips at the end of a stage that trained without it."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moss_train.training.callbacks.validation_data import HeldOutClip
from moss_train.training.module import CatModule, cat_module
from moss_train.training.step.quantizer_start import fit_quantizer
from moss_train.training.step.schedule import Schedule

FIT_CLIPS = 300
FIT_SECONDS = 10.0
"""How much of the training data is looked at."""


class QuantizerFit(Callback):
    """Fits the levels at the updates of `fit_updates`; the same clips and weights give the same codes after a resume.

    Every rank fits the same clips, then takes over what the first one found.
    """

    def __init__(self, clips: Callable[[], Sequence[HeldOutClip]]) -> None:
        self.clips = clips

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        module = cat_module(pl_module)
        if module.update not in fit_updates(module.schedule):
            return
        left = fit_to_clips(module, self.clips())
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


@torch.no_grad()
def fit_to_clips(module: CatModule, clips: Sequence[HeldOutClip]) -> float:
    """Fit to the latents of clips; returns the share of the variance that is left after all levels."""
    tokenizer = module.tokenizer
    latents = [tokenizer.encode_latent(clip.audio[None].to(module.device))[0] for clip in clips]
    return fit_quantizer(tokenizer.quantizer, torch.cat(latents))[-1]
