"""Numbers that are not finite, silent, empty or far too large: weights stay finite, and training continues."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from moss_train import load_config
from moss_train.batch import UpdateBatch
from moss_train.config.fit_schema import FitConfig
from moss_train.data.stream.loader import make_loader
from moss_train.export.load import tokenizer_config
from moss_train.training import CatModule
from moss_train.training.module import update_result
from moss_train.training.run.fit import open_stream
from moss_train.training.run.trainer import build_trainer
from moss_train.training.run.warm_start import plan_initialization

from ..training.gradients import without_text
from .harness import TINY, assert_equal

pytestmark = pytest.mark.faults

EVERYTHING = (
    "stages.0.updates=0",
    "stages.1.discriminator_warmup_updates=0",
    "stages.1.warmup_updates=0",
    "data.max_seconds=2.0",
    "data.micro_batch_seconds=2.0",
)
BAD = 2
"""The update that something happens to; the ones before and after it are as usual."""

Damage = Callable[[CatModule, UpdateBatch], UpdateBatch]


@pytest.fixture(scope="module")
def config(packed: Path) -> FitConfig:
    """Return the tiny recipe with both optimizers and longer texts from the first update on."""
    return load_config("fit", [*TINY, *EVERYTHING, f"data.train={packed}"])


@pytest.fixture(scope="module")
def updates(config: FitConfig) -> list[UpdateBatch]:
    """Return six real updates; the one that is damaged later has a text."""
    stream = open_stream(config, tokenizer_config(config.tokenizer.to_plain()))
    module = CatModule(**plan_initialization(config).arguments)
    assert module.semantic is not None
    loader = make_loader(
        stream,
        text_encoder=module.semantic.text,
        position=0,
        updates=[(number, 1.2) for number in range(12)],
        micro_batch_seconds=2.0,
    )
    found = list(loader)
    with_text = next(update for update in found if any(batch.text_lengths.any() for batch in update.micro_batches))
    others = [update for update in found if update is not with_text]
    return [*others[:BAD], with_text, *others[BAD:5]]


class Watch(Callback):
    """Applies the damage before the bad update; stores the state before it and the metrics of every update."""

    def __init__(self, damage: Damage | None) -> None:
        self.damage = damage
        self.hooks: list[Any] = []
        self.metrics: list[dict[str, float]] = []
        self.before: Any = None
        self.after: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if pl_module.update == BAD:
            self.before = state_of(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.metrics.append(update_result(outputs).metrics)
        if pl_module.update == BAD + 1:
            self.after = state_of(trainer)


def state_of(trainer: Trainer) -> Any:
    """Return the weights and optimizer moments of generator and discriminators."""
    optimizers = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]
    return {"weights": copy.deepcopy(trainer.lightning_module.state_dict()), "optimizers": optimizers}


def train(config: FitConfig, updates: Sequence[UpdateBatch], damage: Damage | None = None) -> Watch:
    """Train on these updates in a real Trainer, with one of them damaged."""
    module, watch = CatModule(**plan_initialization(config).arguments), Watch(damage)
    updates = list(updates)
    if damage is not None:
        updates[BAD] = damage(module, updates[BAD])
    loader = DataLoader(updates, batch_size=None, collate_fn=lambda update: update)
    build_trainer(config.trainer, "cpu", [watch]).fit(module, loader)
    return watch


def with_audio(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Return a damage that changes the audio of all clips of an update."""

    def damage(module: CatModule, update: UpdateBatch) -> UpdateBatch:
        batches = [replace(batch, audio=change(batch.audio.clone())) for batch in update.micro_batches]
        return replace(update, micro_batches=tuple(batches))

    return damage


def one_sample(value: float) -> Damage:
    def change(audio: torch.Tensor) -> torch.Tensor:
        audio[0, 0, 100] = value
        return audio

    return with_audio(change)


def in_gradient(part: str, value: float) -> Damage:
    """Return a damage that sets one gradient of a part to a value, in the bad update only."""

    def damage(module: CatModule, update: UpdateBatch) -> UpdateBatch:
        parameter = next(getattr(module, part).parameters())
        parameter.register_hook(lambda gradient: gradient * value if module.update == BAD else gradient)
        return update

    return damage


NOT_FINITE = {
    "NaN in the audio": one_sample(math.nan),
    "infinity in the audio": one_sample(math.inf),
    "1e30 in the audio": one_sample(1e30),
    "NaN in a gradient of the generator": in_gradient("tokenizer", math.nan),
    "infinity in a gradient of the generator": in_gradient("tokenizer", math.inf),
    "NaN in a gradient of the LM": in_gradient("semantic", math.nan),
    "NaN in a gradient of the discriminators": in_gradient("discriminators", math.nan),
    "infinity in a gradient of the discriminators": in_gradient("discriminators", math.inf),
}


@pytest.mark.parametrize("kind", NOT_FINITE)
def test_an_update_that_is_not_finite_moves_nothing(config, updates, kind: str) -> None:
    """No optimizer step: weights and moments keep every bit, the samples are named, and training continues."""
    with pytest.warns(UserWarning, match=rf"update {BAD} skipped: .* not finite; samples .*\.flac"):
        watch = train(config, updates, NOT_FINITE[kind])
    for before, after in zip(watch.before["optimizers"], watch.after["optimizers"], strict=True):
        for place in after.keys() - before.keys():  # state of the LM, whose first text is in this update
            assert not any(value.any() for value in after.pop(place).values())
    assert_equal(watch.after, watch.before)
    assert not all(map(math.isfinite, watch.metrics[BAD].values()))
    rest = [value for number, row in enumerate(watch.metrics) if number != BAD for value in row.values()]
    assert all(map(math.isfinite, rest))
    assert len(watch.metrics) == len(updates)


def shorten(module: CatModule, update: UpdateBatch) -> UpdateBatch:
    """Cut all clips to one sample, an incomplete frame."""
    batches = []
    for batch in update.micro_batches:
        audio = torch.zeros_like(batch.audio[..., :1920])
        audio[..., 0] = 0.5
        batches.append(replace(batch, audio=audio, audio_lengths=torch.ones_like(batch.audio_lengths)))
    return replace(update, micro_batches=tuple(batches))


def square(audio: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(audio.shape[-1]) // 50 % 2 == 0, 1.0, -1.0).expand_as(audio)


def impulse(audio: torch.Tensor) -> torch.Tensor:
    audio = torch.zeros_like(audio)
    audio[..., 0] = 1.0
    return audio


def noise(audio: torch.Tensor) -> torch.Tensor:
    return torch.rand(audio.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


ODD = {
    "silence": with_audio(torch.zeros_like),
    "denormal numbers": with_audio(lambda audio: torch.full_like(audio, 1e-42)),
    "a constant": with_audio(torch.ones_like),
    "a clipped square wave": with_audio(square),
    "an impulse": with_audio(impulse),
    "white noise at full scale": with_audio(noise),
    "a loss spike": with_audio(lambda audio: audio * 1e4),
    "one sample": shorten,
    "no text": lambda module, update: without_text(update),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_audio_is_an_ordinary_update(config, updates, kind: str) -> None:
    """Every number stays finite, and no step exceeds what gradient clipping and learning rate allow."""
    watch = train(config, updates, ODD[kind])
    values = [value for row in watch.metrics for value in row.values()]
    assert all(map(math.isfinite, values))
    factors = [row["clip_factor/generator"] * row["gradient_norm/generator"] for row in watch.metrics]
    assert max(factors) <= 1.0 + 1e-6
    rate = max(row["learning_rate/generator"] for row in watch.metrics)
    for name, weight in watch.before["weights"].items():
        if name.startswith("tokenizer.") and weight.is_floating_point():
            moved = (watch.after["weights"][name] - weight).abs().max().item()
            assert moved <= 10.5 * rate, name  # AdamW with these betas moves a weight by at most about ten rates


def test_an_update_without_a_single_clip_passes(config, updates) -> None:
    watch = train(config, updates, lambda module, update: replace(update, micro_batches=()))
    assert_equal(watch.after, watch.before)
    assert len(watch.metrics) == len(updates)


def test_what_diverges_stops_with_one_line_and_sound_checkpoints(make_fit) -> None:
    """With a learning rate 10^12 times too large the weights diverge; three skipped updates in a row end the run."""
    fit = make_fit("diverging", "stages.0.learning_rate=1e12", "stages.0.final_learning_rate=1e12")
    outcome = fit.run()
    assert outcome.status == 1, outcome.log[-3000:]
    assert "3 in a row, stopping" in outcome.log
    assert "Traceback" not in outcome.log
    assert fit.checkpoints[0] == "update-00000000"


def test_losses_are_those_of_the_golden_file(make_fit) -> None:
    """24 updates through both stages; two threads or missing vector instructions change the seventh digit.

    The discriminators get crops as they are. At unit RMS, the noise of an untrained tokenizer in a pause is a hundred
    times too loud, and such losses would not be comparable to three digits.
    """
    crops = ("objective.discriminator_unit_rms=false", "objective.discriminator_pre_emphasis=0")
    fit = make_fit("golden", "stages.0.updates=12", "stages.1.updates=12", *EVERYTHING[-2:], *crops)
    fit.finish()
    path = Path(__file__).with_name("golden_losses.csv")
    names, *lines = path.read_text().splitlines()
    rows = fit.rows()
    assert len(rows) == len(lines) == 24
    for row, line in zip(rows, lines, strict=True):
        for name, expected in zip(names.split(","), line.split(","), strict=True):
            assert (row[name] == "") == (expected == ""), (row["update"], name)
            if expected:
                assert float(row[name]) == pytest.approx(float(expected), rel=1e-3), (row["update"], name)
