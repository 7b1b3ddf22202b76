"""The number of transforms in one call on a GPU."""

import pytest
import torch

from moss_train.audio.stft import round_up_rows, transform_rows


def test_few_numbers_of_transforms_serve_all_lengths():
    rounded = [round_up_rows(n) for n in range(1, 2**16)]
    assert all(n <= r <= 1.125 * n for n, r in enumerate(rounded, 1) if n >= 16)
    assert all(n <= r for n, r in enumerate(rounded, 1))
    assert len(set(rounded)) < 9 * 16 + 16


@pytest.mark.parametrize("shape", [(17, 8), (2, 3, 7, 8), (1, 8)])
def test_added_rows_change_nothing(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transform_rows(torch.fft.rfft, rows, round_up=True), torch.fft.rfft(rows))
