"""Streams in bfloat16: weights are cast once, and results equal those under autocast."""

import torch

from moss_train.model.accelerated_step import CastLinearOps, LinearOps
from moss_train.model.transformer import ProjectedTransformer


def test_a_stream_with_weights_cast_once_is_that_of_autocast_to_the_last_bit():
    torch.manual_seed(0)
    stage = ProjectedTransformer(16, 24, 32, 2, 2, 64, window=6, layer_scale=0.5).eval()
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        state, other = (stage.new_state(2, 3, torch.bfloat16) for _ in range(2))
        assert isinstance(state.linears, CastLinearOps)
        assert {weight.dtype for weight in state.linears.weights.values()} == {torch.bfloat16}
        other.linears = LinearOps()
        for start in range(0, 9, 3):
            with torch.autocast("cpu", torch.bfloat16):
                found, expected = (stage(x[:, start : start + 3], one) for one in (state, other))
            assert torch.equal(found, expected)


def test_a_stream_in_float32_casts_nothing():
    stage = ProjectedTransformer(16, 24, 32, 2, 2, 64, window=6).eval()
    with torch.no_grad():
        assert not isinstance(stage.new_state(1, 3).linears, CastLinearOps)
