"""Mel report and its three baselines."""

import math
from pathlib import Path

import pytest
import torch

from moss_train.audio.io import read_audio
from moss_train.losses import multi_scale_mel_distance
from recipes.quickstart.baselines import Reconstructions, low_pass, mean_power_spectrum, mel_report, shaped_noise

RATE = 24_000
AUDIO = Path(__file__).parents[2] / "recipes" / "quickstart" / "audio"


@pytest.fixture(scope="module")
def sentences() -> list[torch.Tensor]:
    """The first two seconds of three real sentences, each [1, T]."""
    paths = sorted(AUDIO.glob("speech/*.flac"))[:3]
    return [read_audio(path, sampling_rate=RATE, num_channels=1)[0][:, : 2 * RATE] for path in paths]


def tone(hertz: float, seconds: float = 1.0) -> torch.Tensor:
    time = torch.arange(int(RATE * seconds), dtype=torch.float64) / RATE
    return torch.sin(2 * math.pi * hertz * time).float().unsqueeze(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_low_pass_keeps_what_is_below_and_removes_what_is_above():
    torch.testing.assert_close(low_pass(tone(500) + tone(5000), RATE), tone(500), atol=1e-4, rtol=0)
    assert low_pass(tone(2001), RATE).abs().max() < 1e-4
    torch.testing.assert_close(low_pass(tone(2000), RATE), tone(2000), atol=1e-4, rtol=0)
    assert low_pass(tone(500)[:, :1001], RATE).shape == (1, 1001)


def test_mean_power_spectrum_of_a_tone_peaks_at_its_bin():
    spectrum = mean_power_spectrum([tone(3000), tone(3000)], window_length=256)
    assert spectrum.shape == (129,)
    assert spectrum.argmax().item() == 3000 * 256 // RATE


def test_mean_power_spectrum_weighs_frames_not_clips():
    one, other = tone(3000, 1.0), tone(6000, 3.0)
    spectrum = mean_power_spectrum([one, other], window_length=256)
    assert (spectrum[64] / spectrum[32]).item() == pytest.approx(3, rel=0.02)


def test_mean_power_spectrum_of_white_noise_is_flat_at_its_variance():
    clip = 0.1 * torch.randn(2, 10 * RATE, generator=generator())
    spectrum = mean_power_spectrum([clip])
    assert spectrum.mean().item() == pytest.approx(0.01, rel=0.02)
    assert (spectrum[1:-1] / 0.01).log10().abs().max() < 0.15


def test_noise_has_the_level_of_the_clip_and_the_shape_of_the_spectrum(sentences):
    spectrum = mean_power_spectrum(sentences)
    clip = torch.cat([sentences[0], 0.1 * sentences[0]])
    noise = shaped_noise(clip, spectrum, generator())
    torch.testing.assert_close(noise.square().mean(-1), clip.square().mean(-1))
    measured = mean_power_spectrum([noise[:1]], 256)
    wanted = spectrum[:-1].view(128, 8).mean(1)
    shape_error = (measured[1:128] / measured.sum()).log10() - (wanted[1:] / wanted.sum()).log10()
    assert shape_error.abs().mean() < 0.1
    assert torch.equal(noise, shaped_noise(clip, spectrum, generator()))
    assert not torch.equal(noise, shaped_noise(clip, spectrum, generator(1)))


def test_noise_at_the_level_of_silence_is_silence():
    assert shaped_noise(torch.zeros(1, 1000), torch.ones(129), generator()).abs().max() == 0


def test_baselines_of_real_speech_are_in_the_expected_order(sentences):
    clips = [Reconstructions(str(i), clip, {"half level": clip / 2}) for i, clip in enumerate(sentences)]
    report = mel_report(clips, noise_spectrum=mean_power_spectrum(sentences), sampling_rate=RATE)
    means = report.means()
    assert list(means) == ["half level", "silence", "noise", "low_pass"]
    assert means["half level"] < means["low_pass"] < means["noise"] < means["silence"]
    assert means["silence"] == pytest.approx(sum(clip.distances["silence"] for clip in report.clips) / 3)
    assert [clip.clip_id for clip in report.clips] == ["0", "1", "2"]


def test_columns_are_the_distance_of_the_loss(sentences):
    original, output = sentences[0], 0.8 * sentences[0].flip(-1)
    report = mel_report(
        [Reconstructions("a", original, {"x": output})], noise_spectrum=torch.ones(9), sampling_rate=RATE
    )
    length = torch.tensor([original.shape[-1]])
    assert report.clips[0].distances["x"] == multi_scale_mel_distance(original[None], output[None], length, RATE).item()


def test_the_report_is_reproducible_and_depends_on_the_seed(sentences):
    clips = [Reconstructions("a", sentences[0], {})]
    first, again, other = (
        mel_report(clips, noise_spectrum=torch.ones(9), sampling_rate=RATE, seed=seed).means() for seed in (0, 0, 1)
    )
    assert first == again
    assert first["noise"] != other["noise"]
    assert first["silence"] == other["silence"]


def test_no_clips_and_missing_columns_are_errors(sentences):
    with pytest.raises(ValueError, match="at least one clip"):
        mel_report([], noise_spectrum=torch.ones(9), sampling_rate=RATE)
    with pytest.raises(ValueError, match="at least one clip"):
        mean_power_spectrum([])
    uneven = [Reconstructions("a", sentences[0], {"x": sentences[0]}), Reconstructions("b", sentences[1], {})]
    with pytest.raises(ValueError, match="clip b has"):
        mel_report(uneven, noise_spectrum=torch.ones(9), sampling_rate=RATE)
