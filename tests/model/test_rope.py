"""Rotary embedding against complex multiplication."""

import math

import pytest
import torch

from moss_train.model.attention import rotate, rotate_in_place, rotation


def test_rotation_is_a_complex_product():
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4], [100, 101, 102, 103, 104]])
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = positions[:, :, None, None].double() * frequencies
    product = torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.view_as_real(product).flatten(-2).float()
    torch.testing.assert_close(rotate(x, rotation(positions, 8, 10000)), expected, rtol=1e-6, atol=1e-6)


def test_both_ways_of_computing_agree():
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(2))
    rotations = rotation(torch.arange(5)[None], 8, 10000)
    compiled = torch.compile(rotate, backend="eager")
    torch.testing.assert_close(compiled(x, rotations), rotate(x, rotations))


def test_scores_depend_on_the_distance_only_after_a_day():
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(1))
    scores = []
    for start in (0, 24 * 3600 * 100):
        positions = torch.tensor([[start, start + 7]])
        both = rotate(torch.cat((key, query), dim=1), rotation(positions, 16, 10000))
        scores.append(float(both[0, 0, 0] @ both[0, 1, 0]))
    assert math.isclose(*scores, abs_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept(dtype):
    x = torch.randn(1, 3, 2, 4).to(dtype)
    assert rotate(x, rotation(torch.arange(3)[None], 4, 10000)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_part_of_a_tensor_is_rotated_in_place(dtype):
    x = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    angles = rotation(torch.arange(5)[None], 8, 10000)
    expected = torch.cat((rotate(x[:, :, :4], angles), x[:, :, 4:]), dim=2)
    rotate_in_place(x[:, :, :4], angles)
    torch.testing.assert_close(x, expected)
