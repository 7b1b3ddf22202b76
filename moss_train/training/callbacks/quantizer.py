"""Fit the quantizer to training clips: after a stage without it, or levels that are added to those of `init`."""

import sys
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moss_train.data.stream.sample_reader import SampleReader
from moss_train.data.stream.stream import AudioStream
from moss_train.training.distributed.collectives import broadcast_from_rank0, gather_over_ranks
from moss_train.training.module import CatModule, cat_module
from moss_train.training.step.quantizer_start import fit_quantizer
from moss_train.training.step.schedule import Schedule
from moss_train.utils.errors import SampleError, UserError

FIT_SECONDS = 1200.0
"""Seconds of training audio that the fit uses, or one pass over the data if that is less."""
FRAMES_PER_CODE = 4
"""The fit uses at least this many frames per code of a level; if need be, the stream repeats clips with other crops."""
MAX_FIT_CLIPS = 100_000


class QuantizerFit(Callback):
    """Fits the quantizer's levels at the end of a stage that does not quantize, before validation and checkpoint.

    Levels that `init` does not have are fitted at the start of the run, unless such a stage follows. If a run resumes
    with other stages, so that it has left such a stage before its end, the levels are fitted when it resumes.
    All ranks fit them to the same clips, the first ones of the training stream, and then copy the result of rank 0.

    Args:
        num_kept: number of levels that come from `init`; None if the run does not start from a model.
    """

    def __init__(self, stream: AudioStream, num_kept: int | None = None) -> None:
        self.stream = stream
        self.num_kept = num_kept
        self.was_continuous = False  # the checkpoint is from within a stage without the quantizer

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        schedule = Schedule.from_config(checkpoint["hyper_parameters"]["stages"])
        update = checkpoint["progress"]["update"]
        is_fitted = update in schedule.quantizer_fits
        self.was_continuous = update > 0 and not is_fitted and not schedule.at(update - 1).stage.quantize

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cat_module(pl_module)
        if self.was_continuous and module.schedule.at(module.update).stage.quantize:
            self._fit(trainer, module, 0)
        has_new = self.num_kept is not None and self.num_kept < module.tokenizer.config.num_quantizers
        if module.update == 0 and has_new and not module.schedule.quantizer_fits:
            self._fit(trainer, module, self.num_kept or 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        module = cat_module(pl_module)
        if module.update in module.schedule.quantizer_fits:
            self._fit(trainer, module, 0)

    @torch.no_grad()
    def _fit(self, trainer: Trainer, module: CatModule, num_kept: int) -> None:
        """Fit all levels but the first `num_kept`, and start the moving average, if there is one, from the result."""
        tokenizer = module.tokenizer
        seconds = min(FIT_SECONDS, sum(self.stream.available_seconds.values()))
        least = FRAMES_PER_CODE * tokenizer.config.quantizer_kwargs["codebook_size"]
        clips = read_clips(self.stream, max(least, round(seconds * tokenizer.config.frame_rate)))
        # A clip that one rank cannot read is left out on all: each forward pass of a sharded model is a collective.
        common = sorted(set.intersection(*map(set, gather_over_ranks(list(clips)))))
        latents = [tokenizer.encode_latent(clips[position][None].to(module.device))[0] for position in common]
        left = fit_quantizer(tokenizer.quantizer, torch.cat(latents), num_kept=num_kept)[-1]
        for tensor in (*tokenizer.quantizer.parameters(), *tokenizer.quantizer.buffers()):
            broadcast_from_rank0(tensor.data)
        if module.average is not None:
            module.average.load_state_dict({"weights": {}})  # at a resume, it has those of the checkpoint
            module.average.start(module.tokenizer)
        if trainer.is_global_zero:
            fitted = f"levels {num_kept + 1} to {tokenizer.config.num_quantizers}" if num_kept else "quantizer"
            print(f"{fitted} fitted, {left:.0%} of the latent's variance is left after all levels", file=sys.stderr)


def read_clips(stream: AudioStream, num_frames: int) -> dict[int, Tensor]:
    """Read clips from the start of the stream until they have `num_frames` frames; returns position -> clip [C, T].

    Clips are padded to whole frames. Unreadable clips are skipped: training counts and reports them when it gets there.

    Raises:
        UserError: too few of the first MAX_FIT_CLIPS clips can be read.
    """
    reader = SampleReader(stream.clip_format, text_encoder=None)
    hop, frames = stream.clip_format.hop_length, 0
    clips: dict[int, Tensor] = {}
    for position in range(MAX_FIT_CLIPS):
        if frames >= num_frames:
            return clips
        with suppress(SampleError):
            audio = reader.read(stream.sample(position)).audio
            clips[position] = F.pad(audio, (0, -audio.shape[-1] % hop))
            frames += clips[position].shape[-1] // hop
    raise UserError(f"{MAX_FIT_CLIPS} clips have {frames} frames that can be read, the codes need {num_frames}")
