"""Train without a run directory, for comparisons at equal data."""

from collections.abc import Sequence

import torch
from lightning.pytorch import Callback
from torch import Tensor

from moss_train.config.fit_schema import FitConfig, StageConfig
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.sample_reader import SampleReader
from moss_train.training.module import CatModule
from moss_train.training.run.fit import open_stream
from moss_train.training.run.trainer import build_trainer, choose_accelerator


def shortened(stages: Sequence[StageConfig], updates: int) -> list[StageConfig]:
    """The stages with all their lengths, warm-ups included, scaled so that they have about `updates` updates in all."""
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
    """Do all updates of the module's schedule on `data.train` of a `fit` configuration, on one device."""
    accelerator = choose_accelerator(config.trainer.accelerator)
    trainer = build_trainer(config.trainer.replace(devices=1, num_nodes=1), accelerator, list(callbacks))
    schedule = module.schedule
    loader = make_loader(
        open_stream(config, module.tokenizer.config),
        text_encoder=None if module.semantic is None else module.semantic.text,
        position=0,
        updates=[(update, schedule.at(update).stage.batch_seconds) for update in range(schedule.updates)],
        micro_batch_seconds=config.data.micro_batch_seconds,
        max_text_tokens=config.data.max_text_tokens,
        num_workers=config.data.num_workers,
    )
    trainer.fit(module, loader)


def packed_clips(config: FitConfig, folder: str, module: CatModule, count: int, longest_seconds: float) -> list[Tensor]:
    """The first `count` clips [C, T] of a packed folder in the stream's order, cropped, at the level of training."""
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
        return [reader.read(stream.sample(position)).audio for position in range(count)]
