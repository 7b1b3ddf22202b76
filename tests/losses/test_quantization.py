"""Commitment and codebook losses against values computed by hand."""

import pytest
import torch

from moss_train.losses import codebook_loss, commitment_loss


def two_levels_two_clips():
    """Differences: level 0 = 1 everywhere, level 1 = 2 everywhere. Clip 0 has 3 valid frames, clip 1 has 1."""
    latents = torch.stack([torch.ones(2, 3, 8), torch.full((2, 3, 8), 2.0)]).requires_grad_()
    rows = torch.zeros(2, 2, 3, 8, requires_grad=True)
    frame_mask = torch.tensor([[True, True, True], [True, False, False]])
    level_mask = torch.tensor([[True, True], [True, False]])  # clip 1 uses the first level only
    return latents, rows, frame_mask, level_mask


@pytest.mark.parametrize("loss", [commitment_loss, codebook_loss])
def test_value_with_dropped_levels_and_padding(loss):
    # Clip 0: 1 + 4. Clip 1: 1, the second level is dropped. Mean over the two clips.
    assert loss(*two_levels_two_clips(), num_clips=2).item() == pytest.approx((5 + 1) / 2)


def test_gradients_reach_one_side_each():
    latents, rows, frame_mask, level_mask = two_levels_two_clips()
    commitment_loss(latents, rows, frame_mask, level_mask, 2).backward()
    assert rows.grad is None
    # d/dx of x^2 / (8 dims * 3 frames * 2 clips) in clip 0, of x^2 / (8 * 1 * 2) in clip 1.
    assert latents.grad[0, 0, 0, 0].item() == pytest.approx(2 / 48)
    assert latents.grad[1, 0, 2, 7].item() == pytest.approx(4 / 48)
    assert latents.grad[0, 1, 0, 0].item() == pytest.approx(2 / 16)
    latents.grad = None
    codebook_loss(latents, rows, frame_mask, level_mask, 2).backward()
    assert latents.grad is None
    assert rows.grad[1, 0, 0, 0].item() == pytest.approx(-4 / 48)


@pytest.mark.parametrize("loss", [commitment_loss, codebook_loss])
def test_every_level_counts(loss):
    """The loss is the sum over levels; counting only the first level is a known mistake of other implementations."""
    latents, rows = torch.ones(5, 1, 2, 8), torch.zeros(5, 1, 2, 8)
    frame_mask = torch.ones(1, 2, dtype=torch.bool)
    for num_levels in range(6):
        level_mask = (torch.arange(5) < num_levels).unsqueeze(1)
        assert loss(latents, rows, frame_mask, level_mask, 1).item() == pytest.approx(num_levels)


def test_masked_places_have_no_gradient_even_when_they_hold_nan():
    latents, rows, frame_mask, level_mask = two_levels_two_clips()
    latents = latents.detach().clone()
    latents[:, 1, 1:] = float("nan")
    latents.requires_grad_()
    loss = commitment_loss(latents, rows, frame_mask, level_mask, 2)
    loss.backward()
    assert loss.item() == pytest.approx(3.0)
    assert latents.grad[:, 1, 1:].abs().max() == 0
    assert latents.grad[1, 1].abs().max() == 0


def test_halves_with_the_global_count_add_up_to_the_batch():
    generator = torch.Generator().manual_seed(0)
    latents, rows = torch.randn(2, 3, 4, 5, 8, generator=generator)
    frame_mask = torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None]
    level_mask = torch.rand(3, 4, generator=generator) < 0.6
    whole = commitment_loss(latents, rows, frame_mask, level_mask, 4)
    parts = (
        commitment_loss(latents[:, part], rows[:, part], frame_mask[part], level_mask[:, part], 4)
        for part in (slice(0, 1), slice(1, 4))
    )
    torch.testing.assert_close(sum(parts), whole)


def test_a_clip_without_valid_frames_counts_as_zero():
    latents, rows, _, level_mask = two_levels_two_clips()
    frame_mask = torch.tensor([[True, True, True], [False, False, False]])
    assert commitment_loss(latents, rows, frame_mask, level_mask, 2).item() == pytest.approx(5 / 2)
