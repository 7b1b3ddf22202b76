"""Masks of clips with different lengths."""

import torch

from moss_train.losses.base import zero_beyond


def test_zeroes_values_and_gradients_beyond_each_length():
    x = torch.full((2, 1, 4), 3.0)
    x[0, 0, 3] = float("nan")
    x.requires_grad_()
    masked = zero_beyond(x, torch.tensor([3, 0]))
    masked.sum().backward()
    assert masked.tolist() == [[[3, 3, 3, 0]], [[0, 0, 0, 0]]]
    assert x.grad.tolist() == [[[1, 1, 1, 0]], [[0, 0, 0, 0]]]


def test_works_without_a_channel_axis():
    assert zero_beyond(torch.ones(2, 3), torch.tensor([1, 9])).tolist() == [[1, 0, 0], [1, 1, 1]]
