"""The mel loss: exact values, padding, additivity, gradients, silence."""

import math
from pathlib import Path

import pytest
import torch

from moss_train.audio.io import read_audio
from moss_train.audio.stft import log_mel_distance, log_mel_spectrogram, mel_bank
from moss_train.losses import MultiScaleMelLoss, multi_scale_mel_distance

RATE = 24_000
AUDIO = Path(__file__).parents[2] / "recipes" / "quickstart" / "audio"


@pytest.fixture(scope="module")
def recording() -> torch.Tensor:
    """The first second of a real recording, [1, 1, T]."""
    audio, _ = read_audio(min(AUDIO.glob("speech/*.flac")), sampling_rate=RATE, num_channels=1)
    return audio[None, :, :RATE]


def noise(*shape: int, seed: int = 0, level: float = 0.1) -> torch.Tensor:
    return level * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths_of(audio: torch.Tensor) -> torch.Tensor:
    return torch.full((audio.shape[0],), audio.shape[-1])


def test_identical_audio_has_distance_zero(recording):
    assert multi_scale_mel_distance(recording, recording.clone(), lengths_of(recording), RATE).tolist() == [0.0]


def test_gain_of_ten_is_one_per_scale():
    audio = noise(2, 1, RATE)
    distance = multi_scale_mel_distance(audio, 10 * audio, lengths_of(audio), RATE)
    torch.testing.assert_close(distance, torch.full((2,), 7.0), atol=2e-3, rtol=0)


def test_loss_equals_the_distance_of_one_clip_and_grows_with_damage(recording):
    length = lengths_of(recording)
    distances = []
    for level in (1e-3, 1e-2, 1e-1):
        degraded = recording + noise(*recording.shape, level=level)
        distances.append(multi_scale_mel_distance(recording, degraded, length, RATE).item())
        assert MultiScaleMelLoss(RATE)(recording, degraded, length).item() == pytest.approx(distances[-1], rel=1e-6)
    assert 0 < distances[0] < distances[1] < distances[2]


def test_mel_of_a_constant_by_hand():
    """In the middle of a constant a, |X_0| = a sum(w) / sqrt(sum(w^2)), |X_1| half of it, all else zero."""
    window = torch.hann_window(64)
    mel = log_mel_spectrogram(torch.full((1, 4096), 0.5), RATE, 64, 10)
    direct = 0.5 * window.sum() / window.square().sum().sqrt()
    bank = mel_bank(RATE, 64, 10, torch.device("cpu"))
    expected = (direct * bank[0] + direct / 2 * bank[1]).clamp(min=1e-5).log10()
    torch.testing.assert_close(mel[0, :, 100], expected, atol=1e-4, rtol=1e-4)


def test_the_bank_has_filters_of_unit_area():
    bank = mel_bank(RATE, 2048, 80, torch.device("cpu"))
    assert bank.shape == (1025, 80)
    torch.testing.assert_close(bank[:, 40:].sum(0) * RATE / 2048, torch.ones(40), atol=0.02, rtol=0)


def test_padding_does_not_change_the_loss(recording):
    reference, degraded = recording, recording + noise(*recording.shape, level=0.01)
    length = lengths_of(recording)
    loss = MultiScaleMelLoss(RATE)
    plain = loss(reference, degraded, length)
    junk = noise(1, 1, 5000, seed=1)
    padded = loss(torch.cat([reference, junk], -1), torch.cat([degraded, 3 * junk.flip(-1)], -1), length)
    torch.testing.assert_close(padded, plain, atol=1e-6, rtol=1e-6)


def test_gradient_is_zero_in_the_padding_and_absent_on_the_reference():
    reference = noise(2, 1, 8000).requires_grad_()
    degraded = noise(2, 1, 8000, seed=1).requires_grad_()
    MultiScaleMelLoss(RATE)(reference, degraded, torch.tensor([8000, 5000])).backward()
    assert reference.grad is None
    assert degraded.grad[1, :, 5000:].abs().max() == 0
    assert (degraded.grad[0] != 0).float().mean() > 0.99
    assert degraded.grad.isfinite().all()


def test_micro_batches_with_the_global_count_add_up():
    reference, degraded = noise(4, 1, 9600), noise(4, 1, 9600, seed=1)
    reference[2] *= 0.01
    lengths = torch.tensor([9600, 1234, 7000, 4801])
    loss = MultiScaleMelLoss(RATE)
    counts = loss.counts(lengths)
    whole = loss(reference, degraded, lengths)
    parts = [
        loss(reference[part], degraded[part], lengths[part], counts) for part in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert sum(loss.counts(lengths[i : i + 1]) for i in range(4)).tolist() == counts.tolist()


def test_loss_is_the_frame_weighted_mean_of_the_clips():
    reference, degraded = noise(2, 1, 8192), noise(2, 1, 8192, seed=1)
    lengths = torch.tensor([8192, 2048])
    loss = MultiScaleMelLoss(RATE, window_lengths=[256], num_mels=[40])
    first, second = loss.distances(reference, degraded, lengths).tolist()
    assert loss.counts(lengths).tolist() == [128 + 32]
    assert loss(reference, degraded, lengths).item() == pytest.approx(0.8 * first + 0.2 * second, rel=1e-5)


@pytest.mark.parametrize(("length", "expected"), [(1, 1), (8, 1), (9, 2), (0, 0)])
def test_a_started_hop_is_a_frame(length, expected):
    loss = MultiScaleMelLoss(RATE, window_lengths=[32], num_mels=[5])
    assert loss.counts(torch.tensor([length])).tolist() == [expected]


def test_silence_gives_finite_values_and_gradients():
    silence = torch.zeros(1, 1, 4800)
    audio = noise(1, 1, 4800).requires_grad_()
    dead = silence.clone().requires_grad_()
    loss = MultiScaleMelLoss(RATE)
    assert loss(silence, silence, torch.tensor([4800])).item() == 0
    value = loss(silence, audio, torch.tensor([4800])) + loss(audio.detach(), dead, torch.tensor([4800]))
    value.backward()
    assert value.isfinite()
    assert audio.grad.isfinite().all()
    assert audio.grad.abs().max() > 0
    assert dead.grad.abs().max() == 0  # nothing above the floor: the loss has no direction there


def test_nothing_valid_is_zero_not_nan():
    audio = noise(1, 1, 4800)
    loss = MultiScaleMelLoss(RATE)
    assert loss(audio, -audio * 2, torch.tensor([0])).item() == 0
    assert loss.distances(audio, audio * 2, torch.tensor([0])).tolist() == [0.0]


def test_empty_filters_at_48_khz_contribute_zero():
    empty = (mel_bank(48_000, 32, 5, torch.device("cpu")).sum(0) == 0).sum().item()
    assert empty > 0
    audio = noise(1, 1, 9600)
    loss = MultiScaleMelLoss(48_000, window_lengths=[32], num_mels=[5])
    assert loss(audio, 10 * audio, torch.tensor([9600])).item() == pytest.approx((5 - empty) / 5, abs=2e-3)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_other_sampling_rates(rate):
    audio = noise(1, 2, rate // 4).requires_grad_()
    value = MultiScaleMelLoss(rate)(noise(1, 2, rate // 4, seed=1), audio, torch.tensor([rate // 4]))
    value.backward()
    assert 0 < value.item() < 7
    assert audio.grad.isfinite().all()


def test_channels_are_averaged():
    left, right = noise(1, 1, 4800), noise(1, 1, 4800, seed=1)
    length = torch.tensor([4800])
    loss = MultiScaleMelLoss(RATE)
    both = loss(torch.cat([left, right], 1), torch.cat([2 * left, 5 * right], 1), length)
    torch.testing.assert_close(both, (loss(left, 2 * left, length) + loss(right, 5 * right, length)) / 2)


def test_autocast_and_half_precision_inputs_do_not_change_the_precision():
    reference, degraded = noise(1, 1, 4800).bfloat16(), noise(1, 1, 4800, seed=1).bfloat16()
    length = torch.tensor([4800])
    loss = MultiScaleMelLoss(RATE)
    plain = loss(reference.float(), degraded.float(), length)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = loss(reference, degraded, length)
    assert under_autocast.dtype == torch.float32
    assert under_autocast.item() == plain.item()


def test_first_use_in_inference_mode_or_on_meta_does_not_spoil_training():
    rate = 22_050  # a rate that no other test uses, so that its filters are created here
    with torch.device("meta"):
        loss = MultiScaleMelLoss(rate)
    with torch.inference_mode():
        loss(noise(1, 1, 4800), noise(1, 1, 4800), torch.tensor([4800]))
    audio = noise(1, 1, 4800, seed=1).requires_grad_()
    loss(noise(1, 1, 4800), audio, torch.tensor([4800])).backward()
    assert audio.grad.abs().max() > 0
    assert not loss.state_dict()


def test_value_is_known_to_differ_from_torch_stft_normalized():
    """`normalized=True` would divide by sqrt(n) instead of sqrt(sum w^2): a shift of log10(sqrt(8 / 3)) = 0.213."""
    audio = noise(1, 4096)
    magnitudes = torch.stft(
        audio, 256, 64, window=torch.hann_window(256), pad_mode="constant", normalized=True, return_complex=True
    ).abs()
    other = (mel_bank(RATE, 256, 40, torch.device("cpu")).T @ magnitudes).log10()
    shift = log_mel_spectrogram(audio, RATE, 256, 40) - other
    torch.testing.assert_close(shift, torch.full_like(shift, math.log10(math.sqrt(8 / 3))), atol=1e-3, rtol=0)


def test_default_scales_hop_from_8_to_512_samples():
    assert MultiScaleMelLoss(RATE).counts(torch.tensor([4096])).tolist() == [512, 256, 128, 64, 32, 16, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_lengths": [32, 64], "num_mels": [5]}, "pair up"),
        ({"window_lengths": [30], "num_mels": [5]}, "multiples of 4"),
        ({"floor": 0.0}, "positive, got 0.0"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleMelLoss(RATE, **arguments)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 1, 100\] and \[1, 1, 101\]"):
        MultiScaleMelLoss(RATE)(torch.zeros(1, 1, 100), torch.zeros(1, 1, 101), torch.tensor([100]))


@pytest.mark.parametrize(("window_length", "num_mels", "floor"), [(64, 10, 1e-5), (512, 80, 1.5e-3)])
def test_the_distance_in_one_step_and_its_gradient_are_those_of_two_spectrograms(window_length, num_mels, floor):
    """With the higher floor many values are at the floor, where there is no gradient."""
    random = torch.Generator().manual_seed(0)
    reference, degraded = (0.1 * torch.randn(3, 2, 3000, generator=random) for _ in range(2))
    degraded[0, 0, :1500] = 0
    degraded.requires_grad_()
    settings = (RATE, window_length, num_mels, floor)
    weights = torch.rand(3, 3000 // (window_length // 4) + 1, generator=random)
    found = log_mel_distance(reference, degraded, *settings)
    (gradient,) = torch.autograd.grad((found * weights).sum(), degraded)
    wanted, got = (log_mel_spectrogram(x, *settings) for x in (reference, degraded))
    expected = (wanted - got).abs().mean(dim=(1, 2))
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), degraded)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert float(gradient.abs().sum()) > 0
