from pathlib import Path

import pytest
import torch
from lightning import LightningModule

from moss_train.config.fit_schema import TrainerConfig
from moss_train.training.callbacks.checkpoint import write_state
from moss_train.training.cost import hardware as resources
from moss_train.training.cost.hardware import StateSize, check_memory
from moss_train.training.run.fit import open_stream, train
from moss_train.training.run.trainer import build_trainer
from moss_train.training.run.warm_start import plan_initialization
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


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_uses_nothing_of_the_gpu(monkeypatch, tmp_path, small_config):
    """Pinned memory would take a CUDA context, and a mapping would keep the disk space of a deleted checkpoint."""
    write_state({"state_dict": {"w": torch.ones(9)}, "progress": {"update": 1, "position": 2}}, tmp_path / "saved")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trainer = build_trainer(TrainerConfig(), "cpu", [])
    weight = trainer.strategy.checkpoint_io.load_checkpoint(tmp_path / "saved")["state_dict"]["w"]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text("utf-8"), weight
    loaders = []
    monkeypatch.setattr(trainer, "fit", lambda module, loader, **_: loaders.append(loader))
    config = small_config("trainer.accelerator=cpu")
    plan = plan_initialization(config)
    stream = open_stream(config, plan.tokenizer_config)
    train(config, None, plan, stream, trainer, range(1))
    assert not loaders[0].pin_memory
