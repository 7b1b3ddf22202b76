"""`trainer.deterministic` sets torch's option, and every operation of both stages is deterministic on a CPU."""

import pytest
import torch

from moss_train.training import CatModule
from moss_train.training.run.warm_start import plan_initialization
from tools.short_runs import train_in_memory

SHORT = [f"stages.{i}.{key}=1" for i in range(2) for key in ("updates", "warmup_updates")]


def test_torch_is_told_and_the_recipe_runs(small_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = small_config(*SHORT, "stages.1.discriminator_warmup_updates=0", "trainer.deterministic=true")
    assert not torch.are_deterministic_algorithms_enabled()
    module = CatModule(**plan_initialization(config).arguments)
    try:
        train_in_memory(config, module)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention ignores the warn-only mode
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert module.update == 2
