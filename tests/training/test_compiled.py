"""A compiled run through both stages, stopped and resumed."""

import pytest
import torch

from moss_train.cli.main import main

from ..faults.harness import assert_same_run

# Few parts to compile, each once for static and once for dynamic lengths.
FEW_PARTS = [
    "tokenizer.stages=[{patch_size: 240, output_dimension: 16, d_model: 32, num_heads: 2, num_layers: 1}, "
    "{patch_size: 8, output_dimension: 24, d_model: 32, num_heads: 2, num_layers: 1}]",
    "discriminators=[{_target_: moss_train.discriminators.MultiPeriodDiscriminator, periods: [2], channels: [2, 4]}]",
    "semantic=null",
    "stages.0.updates=2",
    "stages.1.updates=3",
    "trainer.activation_checkpointing=[100]",
]


def fit(overrides: list[str], *more: str) -> None:
    torch._dynamo.reset()  # as in a new process
    assert main(["fit", *overrides, *FEW_PARTS, *more]) == 0


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_compiled_run_resumes_to_the_last_bit(small_overrides, tmp_path):
    """Stopped after the discriminators' warm-up, when their graphs run one backward pass; later they run two."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(small_overrides, "trainer.compile=aot_eager", f"run_dir={whole}")
    for stop in (3, 5):
        fit(small_overrides, "trainer.compile=aot_eager", f"run_dir={parts}", f"max_updates={stop}")
    assert_same_run(parts, whole)
