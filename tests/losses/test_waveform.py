"""The phase-sensitive losses, against values computed by hand."""

import pytest
import torch

from moss_train.audio.stft import normalized_stft
from moss_train.losses import ComplexSTFTLoss, MidSideLoss, RelativeSquaredErrorLoss, WaveformLoss

LOSSES = [ComplexSTFTLoss(), WaveformLoss(), RelativeSquaredErrorLoss()]


def noise(num_clips: int = 1, channels: int = 1, length: int = 6000, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(num_clips, channels, length, generator=torch.Generator().manual_seed(seed))


def test_waveform_loss_is_the_mean_over_a_clips_own_samples():
    reference, degraded = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    degraded[0] = torch.tensor([[0.2, -0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 0.4]])
    degraded[1] = torch.tensor([[0.3, 0.1, 9.0, 9.0], [0.0, 0.0, 9.0, 9.0]])
    loss = WaveformLoss()(reference, degraded, torch.tensor([4, 2]))
    assert loss.item() == pytest.approx(((0.8 + 0.4) / 8 + 0.4 / 4) / 2)


def test_relative_error_does_not_depend_on_the_level_of_a_clip():
    """Errors of 3 and 4 against samples of 5 and 5: 25 / 50; below the floor the floor counts."""
    reference = torch.tensor([[[5.0, 5.0]], [[0.05, 0.05]], [[0.0, 0.0]]])
    degraded = torch.tensor([[[2.0, 1.0]], [[0.02, 0.01]], [[0.0, 0.02]]])
    loss = RelativeSquaredErrorLoss(floor_rms=0.01)(reference, degraded, torch.tensor([2, 2, 2]))
    assert loss.item() == pytest.approx((0.5 + 0.5 + 0.02**2 / (2 * 0.01**2)) / 3)
    with pytest.raises(ValueError, match="floor_rms"):
        RelativeSquaredErrorLoss(0.0)


def test_a_flipped_waveform_has_no_magnitude_distance_but_a_complex_one():
    """|X - (-X)| in both parts is twice |Re X| + |Im X|; the magnitudes agree."""
    reference, lengths = noise(), torch.tensor([6000])
    spectrum = normalized_stft(reference, 512, 128)[..., : -(-6000 // 128)]
    expected = 2 * (spectrum.real.abs() + spectrum.imag.abs()).mean()
    loss = ComplexSTFTLoss([512])
    assert loss(reference, -reference, lengths).item() == pytest.approx(expected.item(), rel=1e-5)
    # Half as loud: half of both parts, and half of the magnitude.
    expected = 0.5 * (spectrum.real.abs() + spectrum.imag.abs() + spectrum.abs()).mean()
    assert loss(reference, 0.5 * reference, lengths).item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss(reference, reference, lengths).item() == 0


@pytest.mark.parametrize("loss", [*LOSSES, MidSideLoss()], ids=lambda loss: type(loss).__name__)
def test_micro_batches_add_up_and_padding_is_ignored(loss):
    reference, degraded = noise(3, 2), noise(3, 2, seed=1)
    lengths = torch.tensor([6000, 3000, 500])
    whole = loss(reference, degraded, lengths)
    parts = [loss(reference[p], degraded[p], lengths[p], torch.tensor(3)) for p in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(parts), whole)
    short = loss(reference[1:2, :, :3000], degraded[1:2, :, :3000], lengths[1:2])
    torch.testing.assert_close(loss(reference[1:2], degraded[1:2], lengths[1:2]), short)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_the_gradient_is_finite_even_for_silence_and_stays_off_the_padding(loss):
    degraded = torch.zeros(1, 1, 6000, requires_grad=True)
    loss(noise(), degraded, torch.tensor([3000])).backward()
    assert degraded.grad is not None
    assert degraded.grad.isfinite().all()
    assert degraded.grad[..., :3000].abs().max() > 0
    assert degraded.grad[..., 3000:].abs().max() == 0


def test_windows_that_have_no_quarter_are_refused():
    with pytest.raises(ValueError, match="510"):
        ComplexSTFTLoss([510])
