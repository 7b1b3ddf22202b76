"""The mid/side loss detects differences that losses on single channels cannot."""

import pytest
import torch
from auraloss.freq import SumAndDifferenceSTFTLoss

from moss_train.losses import MidSideLoss, MultiScaleMelLoss


def stereo(num_clips: int = 1, length: int = 6000, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(num_clips, 2, length, generator=torch.Generator().manual_seed(seed))


def test_opposite_polarity_is_seen_here_and_not_by_the_mel_loss():
    reference = stereo()
    flipped = reference * torch.tensor([1.0, -1.0])[:, None]
    lengths = torch.tensor([6000])
    assert MultiScaleMelLoss(24_000)(reference, flipped, lengths).item() == pytest.approx(0, abs=1e-5)
    assert MidSideLoss()(reference, flipped, lengths).item() > 0.3
    assert MidSideLoss()(reference, reference, lengths).item() == 0


def test_the_value_is_that_of_auraloss_clip_by_clip():
    """Value and gradient, at lengths that are not whole frames and at one that is shorter than the windows."""
    windows = (512, 1024, 2048)
    theirs = SumAndDifferenceSTFTLoss(
        fft_sizes=windows,
        hop_sizes=[length // 4 for length in windows],
        win_lengths=windows,
        window="hann_window",
        w_sc=0.0,
        w_log_mag=1.0,
        w_lin_mag=1.0,
    )
    reference, degraded, lengths = stereo(4), stereo(4, seed=1).requires_grad_(), torch.tensor([6000, 5000, 3333, 700])
    expected = sum(
        theirs(
            *(
                torch.nn.functional.pad(x[None, :, :length], (0, max(0, 2048 - length)))
                for x in (degraded[i], reference[i])
            )
        )
        for i, length in enumerate(lengths.tolist())
    )
    found = MidSideLoss()(reference, degraded, lengths)
    torch.testing.assert_close(found, expected / 4)
    # Where two magnitudes are almost equal, rounding decides the sign of the gradient.
    ours, wanted = (torch.autograd.grad(value, degraded)[0] for value in (found, expected / 4))
    assert (ours - wanted).norm() < 0.01 * wanted.norm()


def test_equal_channels_do_not_explode():
    """The difference signal of the reference is silent; an error relative to its norm would be in the thousands."""
    reference = stereo()[:, :1].expand(1, 2, 6000)
    degraded = stereo(seed=1).requires_grad_()
    loss = MidSideLoss()(reference, degraded, torch.tensor([6000]))
    loss.backward()
    assert loss.item() < 20
    assert degraded.grad.isfinite().all()


def test_first_use_in_inference_mode_does_not_spoil_training():
    loss = MidSideLoss(window_lengths=(128, 600))  # used in no other test: its windows are created here
    with torch.inference_mode():
        loss(stereo(), stereo(seed=1), torch.tensor([6000]))
    degraded = stereo(seed=1).requires_grad_()
    loss(stereo(), degraded, torch.tensor([6000])).backward()
    assert degraded.grad.abs().max() > 0
    assert not loss.state_dict()


def test_mono_is_refused():
    with pytest.raises(ValueError, match=r"\[B, 2, T\].*\[1, 1, 6000\].*mono"):
        MidSideLoss()(torch.zeros(1, 1, 6000), torch.zeros(1, 1, 6000), torch.tensor([6000]))
