"""Sets of discriminators."""

import pytest
import torch

from moss_train.discriminators import (
    ComplexSTFTDiscriminator,
    DiscriminatorSet,
    MultiPeriodDiscriminator,
    MultiResolutionSTFTDiscriminator,
    PeriodDiscriminator,
)


def small_set(num_channels: int = 1) -> DiscriminatorSet:
    torch.manual_seed(0)
    return DiscriminatorSet(
        [
            MultiPeriodDiscriminator((2, 3), (4, 8), num_channels),
            MultiResolutionSTFTDiscriminator((256, 128), 2, num_channels),
        ]
    )


def waveform(num_clips: int = 2, num_channels: int = 1, length: int = 2000) -> torch.Tensor:
    return 0.1 * torch.randn(num_clips, num_channels, length, generator=torch.Generator().manual_seed(1))


def test_sets_inside_sets_are_flattened_in_order():
    discriminators = small_set()
    assert len(discriminators) == 4
    kinds = [type(d) for d in discriminators.discriminators]
    assert kinds == [PeriodDiscriminator, PeriodDiscriminator, ComplexSTFTDiscriminator, ComplexSTFTDiscriminator]


def test_outputs_are_those_of_the_members():
    discriminators, x = small_set(), waveform()
    outputs = discriminators(x)
    for discriminator, output in zip(discriminators.discriminators, outputs, strict=True):
        torch.testing.assert_close(discriminator(x).logits, output.logits, atol=0, rtol=0)


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("length", [1999, 2000, 331])
def test_the_first_axis_of_everything_is_the_clip(num_channels, length):
    for output in small_set(num_channels)(waveform(3, num_channels, length)):
        assert all(tensor.shape[0] == 3 for tensor in (output.logits, *output.features))
        assert output.logits.isfinite().all()


def test_clips_do_not_see_each_other():
    """Normalization over the batch would leak between clips, and results would depend on the micro-batches."""
    discriminators, x = small_set(), waveform(3)
    together = discriminators(x)
    for index in range(3):
        alone = discriminators(x[index : index + 1])
        for one, all_clips in zip(alone, together, strict=True):
            torch.testing.assert_close(one.logits[0], all_clips.logits[index], atol=1e-6, rtol=1e-5)


def test_level_of_the_input_matters():
    """Peak normalization would hide that a clip is too quiet; it must not be applied."""
    discriminators, x = small_set(), waveform()
    for loud, quiet in zip(discriminators(x), discriminators(0.1 * x), strict=True):
        assert (loud.features[0] - quiet.features[0]).abs().max() > 1e-3


def test_gradient_reaches_the_waveform_and_every_parameter():
    discriminators, x = small_set(), waveform().requires_grad_()
    loss = sum(output.logits.square().mean() for output in discriminators(x))
    loss.backward()
    assert x.grad.abs().max() > 0
    missing = [name for name, parameter in discriminators.named_parameters() if parameter.grad is None]
    assert not missing


def test_bfloat16_autocast_runs_and_stays_close():
    discriminators, x = small_set(), waveform()
    plain = discriminators(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = discriminators(x)
    for one, other in zip(plain, mixed, strict=True):
        assert other.logits.dtype == torch.bfloat16
        torch.testing.assert_close(one.logits, other.logits.float(), atol=0.02, rtol=0.05)


def test_state_dict_holds_parameters_only_and_loads_exactly():
    first, second, x = small_set(), small_set(), waveform()
    assert set(first.state_dict()) == {name for name, _ in first.named_parameters()}
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    second.load_state_dict(first.state_dict())
    for one, other in zip(first(x), second(x), strict=True):
        assert torch.equal(one.logits, other.logits)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        DiscriminatorSet([])
