"""Packed weights for streaming steps: the same products, used only where they are faster."""

import pytest
import torch
from torch import nn

from moss_train.model import codec
from moss_train.model.accelerated_step import LARGEST_ROWS, LinearOps, PrepackedLinearOps, can_pack
from moss_train.model.transformer import LayerScale

from .small_models import small_model


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(256, 520, bias=False)


@pytest.fixture
def gain():
    scale = LayerScale(520, 1.0)
    nn.init.normal_(scale.scale)
    return scale


@pytest.mark.parametrize("rows", [1, 2, 8, LARGEST_ROWS, LARGEST_ROWS + 1])
def test_products_are_the_same(linear, gain, rows):
    x, residual = torch.randn(1, rows, 256), torch.randn(1, rows, 520)
    plain = LinearOps()
    with torch.no_grad():
        packed = PrepackedLinearOps(linear, {})
        assert list(packed.weights) == [linear]
        torch.testing.assert_close(packed(linear, x), plain(linear, x))
        torch.testing.assert_close(packed.gelu(linear, x), plain.gelu(linear, x))
        added = PrepackedLinearOps(linear, {linear: gain.scale}).add(linear, x, residual, gain)
        torch.testing.assert_close(added, plain.add(linear, x, residual, gain), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(added, residual + gain.scale * linear(x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_not_packed_is_applied(linear):
    x = torch.randn(1, 2, 256)
    assert torch.equal(PrepackedLinearOps(nn.Identity(), {})(linear, x), linear(x))
    assert PrepackedLinearOps(linear, {})(nn.Identity(), x) is x


def test_half_precision_is_not_packed(linear):
    x = torch.randn(1, 2, 256)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert PrepackedLinearOps(linear, {})(linear, x).dtype == torch.bfloat16


def test_only_weights_without_gradient_in_float32_are_packed(linear):
    assert not can_pack(linear)
    with torch.no_grad():
        assert can_pack(linear)
        assert not can_pack(nn.Linear(256, 520))
        assert not can_pack(nn.Linear(256, 511, bias=False))
        assert not can_pack(linear.to(torch.bfloat16))


def test_large_models_and_large_chunks_are_not_packed(monkeypatch):
    model = small_model()

    def packed_stages(batch_size, chunk_frames):
        states = model.new_states("encoder", batch_size, chunk_frames)
        return [isinstance(state.linears, PrepackedLinearOps) for state in states]

    assert packed_stages(1, 4) == [True, True, True]
    assert packed_stages(8, 4) == [False, True, True]
    monkeypatch.setattr(codec, "LARGEST_PACKED", 1000)
    assert packed_stages(1, 4) == [False, False, False]
