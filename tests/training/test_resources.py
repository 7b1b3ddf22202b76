import pytest
import torch
from lightning import LightningModule

from moss_train.config.fit_schema import TrainerConfig
from moss_train.training.cost import hardware as resources
from moss_train.training.cost.hardware import StateSize, check_memory
from moss_train.training.run.trainer import build_trainer
from moss_train.utils.errors import UserError

CPU = torch.device("cpu")


def test_the_moving_average_is_one_more_copy_of_the_tokenizer_alone():
    assert StateSize(1000, 100, 10).bytes == 16 * 1110
    assert StateSize(1000, 100, 10, has_average=True).bytes == 16 * 1110 + 4 * 1000
    assert StateSize(1000, 100, 10, has_average=True, shards=4).bytes == (16 * 1100 + 4 * 1000) // 4 + 16 * 10


def test_processes_on_cpus_share_the_memory_of_their_machine(monkeypatch):
    size = StateSize(2**26, 0, 0, has_average=True)  # 1.25 GiB
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 2 * size.bytes)
    check_memory(size, CPU, processes=2)
    with pytest.raises(UserError, match=r"at least 3.8 GiB for .* and moving average of 3 processes .* 2.5 GiB"):
        check_memory(size, CPU, processes=3)


def test_the_end_of_a_run_moves_neither_weights_nor_moments():
    """Lightning would copy them to host memory, which may have less room than the GPU; from "meta" it could not."""
    trainer = build_trainer(TrainerConfig(), "cpu", [])
    module = LightningModule()
    module.layer = torch.nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW(module.parameters())
    module.layer(torch.zeros(1, 2, device="meta")).sum().backward()
    optimizer.step()
    trainer.strategy.connect(module)
    trainer.strategy.optimizers = [optimizer]
    trainer.strategy.teardown()
    assert module.layer.weight.is_meta
    assert optimizer.state[module.layer.weight]["exp_avg"].is_meta
