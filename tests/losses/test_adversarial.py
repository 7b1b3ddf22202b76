"""Adversarial losses against values computed by hand."""

import pytest
import torch

from moss_train.losses import discriminator_loss, feature_matching_loss, generator_loss

# Logits of two discriminators for two clips.
REAL = [torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[[2.0]], [[1.0]]])]
GENERATED = [torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[[0.0]], [[3.0]]])]
# Features of two discriminators, the first with two layers, for two clips.
REAL_FEATURES = [
    [torch.tensor([[1.0, -1.0], [9.0, 9.0]]), torch.tensor([[2.0], [2.0]])],
    [torch.tensor([[4.0], [4.0]])],
]
GENERATED_FEATURES = [
    [torch.tensor([[1.5, -0.5], [9.9, 8.1]]), torch.tensor([[2.0], [3.0]])],
    [torch.tensor([[0.0], [4.0]])],
]


def test_discriminator_loss_by_hand():
    # First: clip 0 has 1/2 + 1/2, clip 1 has 1/4 + 1/4. Second: clip 0 has 1 + 0, clip 1 has 0 + 9.
    expected = ((1.0 + 1.0) / 2 + (0.5 + 9.0) / 2) / 2
    assert discriminator_loss(REAL, GENERATED, num_clips=2).item() == pytest.approx(expected)


def test_generator_loss_by_hand():
    expected = ((0.5 + 1.0) / 2 + (0.25 + 4.0) / 2) / 2
    assert generator_loss(GENERATED, num_clips=2).item() == pytest.approx(expected)


def test_sums_over_discriminators_by_hand():
    # As above, but the two discriminators are added: per clip, then the mean over the two clips.
    expected = ((1.0 + 1.0) + (0.5 + 9.0)) / 2
    assert discriminator_loss(REAL, GENERATED, 2, reduction="sum").item() == pytest.approx(expected)
    expected = ((0.5 + 1.0) + (0.25 + 4.0)) / 2
    assert generator_loss(GENERATED, 2, reduction="sum").item() == pytest.approx(expected)


def test_absolute_feature_matching_is_twice_the_sum_over_layers_and_discriminators():
    clip_0, clip_1 = 0.5 + 0.0 + 4.0, 0.9 + 1.0 + 0.0
    loss = feature_matching_loss(REAL_FEATURES, GENERATED_FEATURES, 2, reduction="absolute_sum")
    assert loss.item() == pytest.approx(2 * (clip_0 + clip_1) / 2)


@pytest.mark.parametrize("loss", [generator_loss, feature_matching_loss])
def test_an_unknown_reduction_is_refused(loss):
    layers = [torch.zeros(1, 1)] if loss is generator_loss else [[torch.zeros(1, 1)]]
    arguments = (layers, 1) if loss is generator_loss else (layers, layers, 1)
    with pytest.raises(ValueError, match="median"):
        loss(*arguments, reduction="median")


def test_feature_matching_of_many_layers_is_that_of_the_formula():
    """Value and gradient of the batched operations against autograd through the formula, layer by layer."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 5, 7), (3, 4, 11), (3, 1)]
    real, generated = (
        [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)] for _ in range(2)
    )
    leaves = [layer.requires_grad_() for layers in generated for layer in layers]
    ratios = [
        torch.stack(
            [
                (x - y).flatten(1).abs().mean(1) / x.flatten(1).abs().mean(1).clamp(min=1e-5)
                for x, y in zip(*pair, strict=True)
            ]
        ).mean(0)
        for pair in zip(real, generated, strict=True)
    ]
    expected = torch.stack(ratios).mean(0).sum() / 5
    found = feature_matching_loss(real, generated, 5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * expected, leaves))


def test_perfect_discriminator_has_no_loss_and_undecided_one_a_half():
    ones, zeros, half = torch.ones(3, 1, 7), torch.zeros(3, 1, 7), torch.full((3, 1, 7), 0.5)
    assert discriminator_loss([ones], [zeros], 3).item() == 0
    assert discriminator_loss([half], [half], 3).item() == 0.5


def test_number_of_logits_does_not_weigh_a_discriminator():
    few, many = torch.zeros(2, 1, 3), torch.full((2, 1, 3000), 0.5)
    assert generator_loss([few, many], 2).item() == pytest.approx((1 + 0.25) / 2)


def test_feature_matching_is_a_mean_of_ratios_per_clip_layer_and_discriminator():
    clip_0 = ((0.5 + 0.0) / 2 + 1.0) / 2
    clip_1 = ((0.1 + 0.5) / 2 + 0.0) / 2
    assert feature_matching_loss(REAL_FEATURES, GENERATED_FEATURES, 2).item() == pytest.approx((clip_0 + clip_1) / 2)


def test_feature_matching_ignores_the_scale_of_a_layer():
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(2, 2, 4, 16, generator=generator)
    plain = feature_matching_loss([[real]], [[generated]], 2)
    torch.testing.assert_close(feature_matching_loss([[real * 50]], [[generated * 50]], 2), plain)


def test_feature_matching_divides_by_eps_where_the_real_features_are_zero():
    loss = feature_matching_loss([[torch.zeros(1, 4)]], [[torch.full((1, 4), 0.25)]], 1, eps=0.5)
    assert loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize("seed", [0, 1])
def test_halves_with_the_global_count_add_up_to_the_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    real, generated = torch.randn(2, 4, 3, 10, generator=generator) * torch.tensor([1.0, 5.0, 0.2, 30.0])[:, None, None]
    parts = [slice(0, 1), slice(1, 4)]
    for loss in (
        lambda part: discriminator_loss([real[part]], [generated[part]], 4),
        lambda part: generator_loss([generated[part]], 4),
        lambda part: feature_matching_loss([[real[part]]], [[generated[part]]], 4),
    ):
        torch.testing.assert_close(sum(loss(part) for part in parts), loss(slice(None)))


def test_feature_gradient_reaches_the_generated_side_only():
    real = torch.ones(2, 3, requires_grad=True)
    generated = torch.zeros(2, 3, requires_grad=True)
    feature_matching_loss([[real]], [[generated]], 2).backward()
    assert real.grad is None
    torch.testing.assert_close(generated.grad, torch.full((2, 3), -1 / 6))


def test_bfloat16_inputs_are_compared_in_float32():
    real, generated = torch.full((1, 2), 1.0, dtype=torch.bfloat16), torch.full((1, 2), 1.0078125, dtype=torch.bfloat16)
    loss = feature_matching_loss([[real]], [[generated]], 1)
    assert loss.dtype == torch.float32
    assert loss.item() == 0.0078125


def test_different_numbers_of_discriminators_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        discriminator_loss([torch.zeros(1, 1)], [torch.zeros(1, 1)] * 2, 1)
