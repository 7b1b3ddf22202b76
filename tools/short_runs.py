"""Train without a run directory, and evaluate at several numbers of levels: shared by comparisons at equal data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor

from moss_train.audio.io import resample
from moss_train.config.fit_schema import FitConfig
from moss_train.config.recipe_schema import StageConfig
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.sample_reader import SampleReader
from moss_train.losses.reconstruction import multi_scale_mel_distance
from moss_train.training.callbacks.quantizer import QuantizerFit
from moss_train.training.module import CatModule
from moss_train.training.run.fit import open_stream
from moss_train.training.run.trainer import build_trainer, choose_accelerator


def shortened(stages: Sequence[StageConfig], updates: int) -> list[StageConfig]:
    """Return the stages with all lengths, including warm-ups, scaled to about `updates` updates in total."""
    factor = updates / sum(stage.updates for stage in stages)

    def scaled(length: int) -> int:
        return max(1, round(length * factor)) if length else 0

    return [
        stage.replace(
            updates=scaled(stage.updates),
            warmup_updates=scaled(stage.warmup_updates),
            discriminator_warmup_updates=scaled(stage.discriminator_warmup_updates),
        )
        for stage in stages
    ]


def train_in_memory(config: FitConfig, module: CatModule, callbacks: Sequence[Callback] = ()) -> None:
    """Run all updates of the module's schedule on `data.train` of a `fit` configuration, on one device.

    As in `fit`, the levels are fitted to the latents at the end of a stage without quantizer.
    """
    accelerator = choose_accelerator(config.trainer.accelerator)
    stream = open_stream(config, module.tokenizer.config)
    callbacks = [QuantizerFit(stream), *callbacks]
    trainer = build_trainer(config.trainer.replace(devices=1, num_nodes=1), accelerator, callbacks)
    schedule = module.schedule
    loader = make_loader(
        stream,
        text_encoder=None if module.semantic is None else module.semantic.text,
        position=0,
        updates=[(update, schedule.at(update).stage.batch_seconds) for update in range(schedule.updates)],
        micro_batch_seconds=config.data.micro_batch_seconds,
        max_text_tokens=config.data.max_text_tokens,
        num_workers=config.data.num_workers,
        pin_memory=accelerator == "cuda",
    )
    trainer.fit(module, loader)


def packed_clips(config: FitConfig, folder: str, module: CatModule, count: int, longest_seconds: float) -> list[Tensor]:
    """Return the first `count` clips [C, T] of a packed folder in stream order, cropped, at the training level."""
    data = config.data.replace(
        crop_seconds=longest_seconds,
        max_seconds=longest_seconds,
        train=[folder],
        path=None,
        weights=None,
        gain_db=None,
    )
    stream = open_stream(config.replace(data=data, seed=0), module.tokenizer.config)
    reader = SampleReader(stream.clip_format, None)
    with torch.inference_mode():
        clips = [reader.read(stream.sample(position)) for position in range(count)]
    return [clip.audio if clip.target is None else clip.target for clip in clips]


@dataclass(frozen=True)
class DepthReport:
    """Mean seven-scale mel distance over clips by number of levels, and the codebook usage of every level."""

    distances: Mapping[int, float]
    used_shares: tuple[float, ...]  # share of the entries of the level's codebook that occur
    perplexities: tuple[float, ...]  # exp of the entropy of the level's codes, in entries


def quarter_depths(num_quantizers: int) -> tuple[int, ...]:
    """Return the numbers of levels of a short table: 1, a quarter, half and all of them."""
    return tuple(sorted({1, max(1, num_quantizers // 4), max(1, num_quantizers // 2), num_quantizers}))


@torch.no_grad()
def depth_report(tokenizer: Any, clips: Iterable[Tensor], depths: Sequence[int]) -> DepthReport:
    """Encode every clip [C, T], given at the decoder's rate, once, and decode it at every depth.

    Args:
        tokenizer: has the members of `MossAudioTokenizerModel` that training uses: `encode_latent`, `quantizer`,
            `decode_latent`, `config`. Its train or eval mode is not changed.

    Raises:
        ValueError: there is no clip.
    """
    config = tokenizer.config
    counts = torch.zeros(config.num_quantizers, config.quantizer_kwargs["codebook_size"])
    distances: dict[int, list[float]] = {levels: [] for levels in depths}
    device = tokenizer.quantizer.quantizers[0].codebook.weight.device
    for clip in clips:
        wanted, length = clip.to(device)[None], clip.shape[-1]
        audio = resample(wanted, config.output_sampling_rate, config.sampling_rate)
        audio = F.pad(audio, (0, -audio.shape[-1] % config.downsample_rate))
        codes = tokenizer.quantizer.encode(tokenizer.encode_latent(audio), config.num_quantizers)
        counts += torch.stack([torch.bincount(level.flatten(), minlength=counts.shape[1]) for level in codes]).cpu()
        for levels, values in distances.items():
            restored = tokenizer.decode_latent(tokenizer.quantizer.decode(codes[:levels]))[..., :length]
            whole = torch.tensor([length], device=device)
            values.append(multi_scale_mel_distance(wanted, restored, whole, config.output_sampling_rate).item())
    if not counts.any():
        raise ValueError("a depth report needs at least one clip, got none")
    shares = counts / counts.sum(dim=1, keepdim=True)
    return DepthReport(
        {levels: fmean(values) for levels, values in distances.items()},
        tuple((counts > 0).float().mean(dim=1).tolist()),
        tuple(torch.special.entr(shares).sum(dim=1).exp().tolist()),
    )
