"""Packed weights of streaming steps: the same products, only where they pay."""

import pytest
import torch
from torch import nn

from moss_train.model import passes
from moss_train.model.packing import LARGEST_ROWS, PackedLinears, can_pack

from .small_models import small_model


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=False)


@pytest.mark.parametrize("rows", [1, 2, 8, LARGEST_ROWS, LARGEST_ROWS + 1])
def test_products_are_the_same(linear, rows):
    x = torch.randn(1, rows, 48)
    with torch.no_grad():
        torch.testing.assert_close(PackedLinears(linear)(linear, x), linear(x))


def test_a_layer_that_is_not_packed_is_applied(linear):
    x = torch.randn(1, 2, 48)
    assert torch.equal(PackedLinears(nn.Identity())(linear, x), linear(x))
    assert PackedLinears(linear)(nn.Identity(), x) is x


def test_only_weights_without_gradient_in_float32_are_packed(linear):
    assert not can_pack(linear)
    with torch.no_grad():
        assert not can_pack(nn.Linear(4, 4))
        assert not can_pack(nn.Linear(4, 4, bias=False).to(torch.bfloat16))


def test_large_models_and_large_chunks_are_not_packed(monkeypatch):
    model = small_model()

    def packed_stages(batch_size, chunk_frames):
        states = passes.new_states(model, "encoder", batch_size, chunk_frames)
        return [isinstance(state.linear, PackedLinears) for state in states]

    assert packed_stages(1, 4) == [True, True, True]
    assert packed_stages(8, 4) == [False, True, True]
    monkeypatch.setattr(passes, "LARGEST_PACKED", 1000)
    assert packed_stages(1, 4) == [False, False, False]
