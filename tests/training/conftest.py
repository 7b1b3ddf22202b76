"""Small configurations of the real recipe."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moss_train import load_config
from moss_train.batch import UpdateBatch
from moss_train.cli.main import main
from moss_train.config.fit_schema import FitConfig
from moss_train.data.stream.loader import make_loader
from moss_train.export.load import tokenizer_config
from moss_train.training import CatModule
from moss_train.training.run.fit import open_stream
from moss_train.training.run.warm_start import plan_initialization

from .runs import FIT

SMALL = [
    "tokenizer.stages.0={patch_size: 240, output_dimension: 16, d_model: 32, num_heads: 2, num_layers: 1}",
    "tokenizer.stages.1={patch_size: 2, output_dimension: 16, d_model: 32, num_heads: 2, num_layers: 1}",
    "tokenizer.stages.2={patch_size: 2, output_dimension: 16, d_model: 32, num_heads: 2, num_layers: 1}",
    "tokenizer.stages.3={patch_size: 2, output_dimension: 24, d_model: 32, num_heads: 2, num_layers: 1}",
    "tokenizer.quantizer={rvq_dim: 16, num_quantizers: 4, codebook_size: 32, codebook_dim: 8}",
    "semantic.config.hidden_size=32",
    "semantic.config.intermediate_size=64",
    "semantic.config.num_hidden_layers=1",
    "semantic.config.num_attention_heads=2",
    "semantic.config.num_key_value_heads=1",
    "discriminators.0.channels=[2, 4]",
    "discriminators.1.channels=2",
    "discriminators.1.window_lengths=[512]",
    "objective.discriminator_crop_seconds=0.12",
    "data.crop_seconds=0.4",
    "data.max_seconds=6",
    "data.micro_batch_seconds=8",
    "data.num_workers=0",
    "stages.0.updates=4",
    "stages.0.batch_seconds=4",
    "stages.0.warmup_updates=2",
    "stages.1.updates=4",
    "stages.1.batch_seconds=2",
    "stages.1.warmup_updates=1",
    "stages.1.discriminator_warmup_updates=1",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.num_threads=1",
    "checkpoint.every_updates=2",
    "wandb=null",
    "logging.window_updates=3",
    "logging.log_gradient_shares_every=2",
]


@pytest.fixture(scope="session")
def small_overrides(packed: Path) -> list[str]:
    """`fit` overrides that shrink `cat_1b6` in widths, depths, batch and updates only."""
    return ["experiment=cat_1b6", f"data.train={packed}", *SMALL]


@pytest.fixture(scope="session")
def whole(small_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the small version of the published recipe through both stages without interruption, from the command line."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["fit", *small_overrides, f"run_dir={directory}"]) == 0
    return directory


@pytest.fixture(scope="session")
def validated(small_overrides: list[str], recordings: Path) -> list[str]:
    """Return overrides of a run with validation after every second update."""
    return [
        *small_overrides,
        f"validation.data={recordings / 'heldout.jsonl'}",
        "validation.every_updates=2",
        "validation.max_clips=4",
        "validation.metrics=[si_sdr]",
        "validation.metrics_clips=2",
        "validation.samples_every_updates=4",
        "validation.samples_clips=4",
    ]


@pytest.fixture(scope="session")
def watched(validated: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do a run with validation and samples."""
    directory = tmp_path_factory.mktemp("runs") / "watched"
    assert main(["fit", *validated, f"run_dir={directory}"]) == 0
    return directory


@pytest.fixture
def module(small_config: Callable[..., FitConfig]) -> CatModule:
    return CatModule(**plan_initialization(small_config()).arguments)


@pytest.fixture
def update(small_config: Callable[..., FitConfig], module: CatModule) -> UpdateBatch:
    """Return a real update of several micro-batches, with and without text."""
    config = small_config()
    stream = open_stream(config, tokenizer_config(config.tokenizer.to_plain()))
    loader = make_loader(
        stream, text_encoder=module.semantic.text, position=0, updates=[(0, 16.0)], micro_batch_seconds=8.0
    )
    batch = next(iter(loader))
    assert len(batch.micro_batches) > 1
    return batch


@pytest.fixture
def small_config(small_overrides: list[str], tmp_path: Path) -> Callable[..., FitConfig]:
    """Return a function for the resolved `fit` configuration of the small recipe, with further overrides."""

    def make(*overrides: str) -> FitConfig:
        return load_config("fit", [*small_overrides, f"run_dir={tmp_path / 'run'}", *overrides])

    return make


@pytest.fixture
def finetune_config(tmp_path: Path) -> Callable[..., FitConfig]:
    """Return a function for the resolved `fit` configuration of the experiment `finetune`, with further overrides."""

    def make(*overrides: str) -> FitConfig:
        given = ["experiment=finetune", "trainer.num_threads=1", f"run_dir={tmp_path / 'run'}", *overrides]
        return load_config("fit", given)

    return make


@pytest.fixture
def start(small_overrides) -> Iterator:
    """Start `fit` in its own process; processes that a test leaves running are killed."""
    processes = []

    def run(
        directory: Path, *overrides: str, launcher: tuple[str, ...] = (sys.executable, *FIT), **environment: str
    ) -> subprocess.Popen:
        command = [*launcher, *small_overrides, f"run_dir={directory}", *overrides]
        processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()
