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
"""How much of the training data the fit looks at, or one pass over it if that is less."""
FRAMES_PER_CODE = 4
"""But at least so many frames for every code of a level; the stream repeats clips for that, cropped elsewhere."""
MAX_FIT_CLIPS = 100_000


class QuantizerFit(Callback):
    """Fits the levels at the end of a stage without them, before it is validated and its checkpoint is written.

    All ranks fit the same clips, the first ones of the training stream, then take over what the first rank found.
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
    """Read clips [C, T] by position from the start of the stream, together `num_frames` frames, padded to whole ones.

    Clips that cannot be read are passed over: training counts and names them when it comes to them.

    Raises:
        UserError: hardly any clip can be read.
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
