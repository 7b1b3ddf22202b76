"""Windowed attention against a dense mask, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from moss_train.model.attention import windowed_attention

WINDOW = 8


def dense(query, key, value, window):
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])[None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(distance >= 0) & (distance < window))


@pytest.mark.parametrize("frames", [1, 7, 8, 9, 15, 16, 17, 24, 61])
def test_equals_a_dense_mask(frames):
    generator = torch.Generator().manual_seed(frames)
    inputs = [torch.randn(2, 3, frames, 4, generator=generator, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 3, frames, 4, generator=generator)
    results = []
    for attention in (windowed_attention, dense):
        output = attention(*inputs, WINDOW)
        results.append((output, *torch.autograd.grad((output * weight).sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_window_of_one_frame_sees_only_itself():
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    torch.testing.assert_close(windowed_attention(query, key, value, 1), value)
