"""Multi-period discriminator: size, folding, features."""

import pytest
import torch

from moss_train.discriminators import MultiPeriodDiscriminator, PeriodDiscriminator


def test_default_size_is_that_of_hifi_gan():
    assert sum(p.numel() for p in MultiPeriodDiscriminator().parameters()) == 41_105_770


@pytest.mark.parametrize(("length", "rows"), [(300, 60), (301, 61), (304, 61)])
def test_rows_are_started_periods(length, rows):
    discriminator = PeriodDiscriminator(5, (4, 8))
    output = discriminator(torch.randn(2, 1, length))
    strided = -(-rows // 3)  # the first layer has a stride of three, the second of one
    assert [tuple(f.shape) for f in output.features] == [(2, 4, strided, 5), (2, 8, strided, 5)]
    assert output.logits.shape == (2, 1, strided, 5)


def test_last_row_is_completed_by_reflection():
    folded = PeriodDiscriminator(3, (4,))._fold(torch.arange(7.0).view(1, 1, 7))
    assert folded.tolist() == [[[[0, 1, 2], [3, 4, 5], [6, 5, 4]]]]


def test_columns_do_not_mix():
    x = torch.randn(1, 1, 200, generator=torch.Generator().manual_seed(0)).requires_grad_()
    PeriodDiscriminator(4, (4, 4))(x).logits[..., 1].sum().backward()
    touched = x.grad.view(-1, 4).abs().sum(0) > 0
    assert touched.tolist() == [False, True, False, False]


def test_features_are_every_hidden_layer_without_the_logits():
    output = PeriodDiscriminator(2, (4, 8, 16))(torch.randn(1, 1, 100))
    assert [f.shape[1] for f in output.features] == [4, 8, 16]


@pytest.mark.parametrize(("period", "channels"), [(0, (4,)), (2, ())])
def test_impossible_settings_are_refused(period, channels):
    with pytest.raises(ValueError, match=f"period={period}"):
        PeriodDiscriminator(period, channels)


@pytest.mark.parametrize("length", [23, 24, 29])
def test_completion_is_that_of_torch_in_value_and_gradient(length):
    """torch's own operation has a nondeterministic gradient on a GPU, which `trainer.deterministic` would refuse."""
    waveform = torch.randn(2, 1, length, generator=torch.Generator().manual_seed(0))
    ours, theirs = waveform.clone().requires_grad_(), waveform.clone().requires_grad_()
    folded = PeriodDiscriminator(5, [2])._fold(ours)
    padded = torch.nn.functional.pad(theirs, (0, -length % 5), mode="reflect")
    assert torch.equal(folded.flatten(2), padded)
    weights = torch.randn(padded.shape, generator=torch.Generator().manual_seed(1))
    (folded.flatten(2) * weights).sum().backward()
    (padded * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
