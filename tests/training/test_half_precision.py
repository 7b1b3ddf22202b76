"""bfloat16: when it is chosen, and that gathering weights in it changes no result."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moss_train.model.transformer import ProjectedTransformer
from moss_train.training.distributed.fsdp import FSDPUnits, is_sharded
from moss_train.training.run.trainer import choose_precision


@pytest.mark.parametrize(
    ("wanted", "accelerator", "has_bf16", "expected"),
    [
        ("auto", "cuda", True, "bf16-mixed"),
        ("auto", "cuda", False, "32-true"),
        ("auto", "cpu", True, "32-true"),
        ("32-true", "cuda", True, "32-true"),
        ("bf16-mixed", "cpu", False, "bf16-mixed"),
    ],
)
def test_the_precision_that_a_setting_means(monkeypatch, wanted, accelerator, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_precision(wanted, accelerator) == expected


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))["data_parallel"]
    dist.destroy_process_group()


def gradients(stage: nn.Module, num_micro_batches: int) -> list[torch.Tensor]:
    """Return gradients of some micro-batches under bf16 autocast that, like Lightning's, does not cache casts."""
    random = torch.Generator().manual_seed(1)
    for _ in range(num_micro_batches):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = stage(torch.randn(2, 9, 16, generator=random)).float().square().mean()
        loss.backward()
    return [(p.grad.full_tensor() if is_sharded(p.grad) else p.grad).clone() for p in stage.parameters()]


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3])
@pytest.mark.parametrize("gather_dtype", [None, torch.bfloat16])
def test_weights_gathered_in_bfloat16_give_the_same_gradients_to_the_last_bit(alone, gather_dtype, num_micro_batches):
    torch.manual_seed(0)
    whole = ProjectedTransformer(16, 24, 32, 2, 3, 64, window=5, layer_scale=0.5)
    sharded = copy.deepcopy(whole)
    FSDPUnits([sharded], alone, None, gather_dtype)
    found, expected = gradients(sharded, num_micro_batches), gradients(whole, num_micro_batches)
    assert [gradient.dtype for gradient in found] == [torch.float32] * len(expected)
    for (name, _), one, other in zip(whole.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
