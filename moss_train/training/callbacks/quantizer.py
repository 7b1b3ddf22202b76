"""Fit the quantizer to training clips after a stage without it."""

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
from moss_train.training.module import cat_module
from moss_train.training.step.quantizer_start import fit_quantizer
from moss_train.utils.errors import SampleError, UserError

FIT_SECONDS = 1200.0
"""Seconds of training audio that the fit uses, or one pass over the data if that is less."""
FRAMES_PER_CODE = 4
"""The fit uses at least this many frames per code of a level; if need be, the stream repeats clips with other crops."""
MAX_FIT_CLIPS = 100_000


class QuantizerFit(Callback):
    """Fits the quantizer's levels at the end of a stage that does not quantize, before validation and checkpoint.

    All ranks fit them to the same clips, the first ones of the training stream, and then copy the result of rank 0.
    """

    def __init__(self, stream: AudioStream) -> None:
        self.stream = stream

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        module = cat_module(pl_module)
        if module.update not in module.schedule.quantizer_fits:
            return
        tokenizer = module.tokenizer
        seconds = min(FIT_SECONDS, sum(self.stream.available_seconds.values()))
        least = FRAMES_PER_CODE * tokenizer.config.quantizer_kwargs["codebook_size"]
        clips = read_clips(self.stream, max(least, round(seconds * tokenizer.config.frame_rate)))
        # A clip that one rank cannot read is left out on all: each forward pass of a sharded model is a collective.
        common = sorted(set.intersection(*map(set, gather_over_ranks(list(clips)))))
        latents = [tokenizer.encode_latent(clips[position][None].to(module.device))[0] for position in common]
        left = fit_quantizer(tokenizer.quantizer, torch.cat(latents))[-1]
        for tensor in (*tokenizer.quantizer.parameters(), *tokenizer.quantizer.buffers()):
            broadcast_from_rank0(tensor.data)
        if module.average is not None:
            module.average.start(tokenizer)
        if trainer.is_global_zero:
            print(f"quantizer fitted, {left:.0%} of the latent's variance is left after all levels", file=sys.stderr)


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
