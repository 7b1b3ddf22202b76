"""Reading and writing files: exact round trips, conversions, and errors for every kind of damage that name the file."""

import io
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from moss_train.audio.io import _resample_one_by_one, audio_info, read_audio, resample, to_pcm16, write_audio
from moss_train.utils.errors import UserError

RECORDINGS = Path(__file__).parents[2] / "recipes" / "quickstart" / "audio"


@pytest.fixture(scope="module")
def recording() -> Path:
    return sorted((RECORDINGS / "speech").glob("*.flac"))[0]


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_every_16_bit_value_survives_a_round_trip(tmp_path: Path, suffix: str) -> None:
    audio = (torch.arange(-32768, 32768) / 32768).reshape(2, -1)
    write_audio(tmp_path / f"x.{suffix}", audio, 24000)
    back, rate = read_audio(tmp_path / f"x.{suffix}")
    assert rate == 24000
    assert torch.equal(back, audio)


def test_overs_are_clipped_and_do_not_wrap() -> None:
    assert to_pcm16(torch.tensor([[1.5, 1.0, -1.0, -3.0]])).tolist() == [[32767, 32767, -32768, -32768]]


def test_a_part_equals_the_same_part_of_the_whole(recording: Path) -> None:
    whole, rate = read_audio(recording)
    info = audio_info(recording)
    assert whole.shape == (info.num_channels, info.num_samples)
    assert rate == info.sampling_rate == 24000
    part, _ = read_audio(recording, start=5000, num_samples=777)
    assert torch.equal(part, whole[:, 5000:5777])
    tail, _ = read_audio(io.BytesIO(recording.read_bytes()), start=info.num_samples - 3)
    assert torch.equal(tail, whole[:, -3:])


@pytest.mark.parametrize(("length", "to_rate", "expected"), [(24000, 48000, 48000), (1001, 16000, 668), (1, 8000, 1)])
def test_resampled_length_is_rounded_up(length: int, to_rate: int, expected: int) -> None:
    assert resample(torch.zeros(2, length), 24000, to_rate).shape == (2, expected)


def test_resampled_length_is_exact_for_long_audio() -> None:
    for length in (44100 * 60 + 1, 44100 * 60 + 24, 44100 * 720 + 1):
        resampled = resample(torch.ones(1, length), 44100, 24000)
        assert resampled.shape == (1, -(-length * 24000 // 44100))
        assert resampled[0, -20:-10].mean() == pytest.approx(1.0, abs=0.02)


def test_no_audio_stays_no_audio() -> None:
    assert resample(torch.zeros(2, 0), 44100, 24000).shape == (2, 0)


@pytest.mark.parametrize(("rate", "frequency"), [(44101, 1000.0), (7999, 300.0), (767_999, 5000.0)])
def test_rates_without_a_common_divisor_need_little_memory(rate: int, frequency: float) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tone = 0.5 * torch.sin(2 * math.pi * frequency * torch.arange(rate, dtype=torch.float64) / rate).float()
    resampled = resample(torch.stack([tone, -tone]), rate, 24000)
    expected = 0.5 * torch.sin(2 * math.pi * frequency * torch.arange(24000, dtype=torch.float64) / 24000).float()
    assert resampled.shape == (2, 24000)
    assert torch.equal(resampled[0], -resampled[1])
    assert (resampled[0] - expected)[100:-100].abs().max() < 2e-3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kilobytes


def test_a_filter_for_each_sample_is_the_filter_bank(recording: Path) -> None:
    audio, _ = read_audio(recording)
    for old, new in ((147, 80), (80, 147), (2, 1), (3, 2)):
        wanted = torchaudio.functional.resample(audio, old, new)
        found = _resample_one_by_one(audio, old, new, wanted.shape[-1])
        assert torch.allclose(found, wanted, atol=2e-5)


def test_resampling_there_and_back_keeps_speech(recording: Path) -> None:
    audio, _ = read_audio(recording)
    back = resample(resample(audio, 24000, 48000), 48000, 24000)[:, : audio.shape[1]]
    assert (back - audio).square().mean() < 1e-3 * audio.square().mean()


def test_channels_convert_by_mean_and_repetition(tmp_path: Path) -> None:
    write_audio(tmp_path / "stereo.wav", torch.tensor([[0.5, 0.25], [0.25, -0.25]]), 24000)
    mono, _ = read_audio(tmp_path / "stereo.wav", num_channels=1)
    assert mono.tolist() == [[0.375, 0.0]]
    write_audio(tmp_path / "mono.wav", mono, 24000)
    assert read_audio(tmp_path / "mono.wav", num_channels=2)[0].tolist() == [[0.375, 0.0]] * 2
    write_audio(tmp_path / "three.wav", torch.zeros(3, 8), 24000)
    with pytest.raises(UserError, match=r"three.wav has 3 channels, which do not convert to 2"):
        read_audio(tmp_path / "three.wav", num_channels=2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_an_error(tmp_path: Path, value: float) -> None:
    soundfile.write(tmp_path / "bad.wav", np.array([0.0, value, 0.5], np.float32), 24000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"bad\.wav contains NaN or infinite samples"):
        read_audio(tmp_path / "bad.wav")


def test_errors_name_the_file(tmp_path: Path, recording: Path) -> None:
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "empty.flac").touch()
    with pytest.raises(UserError, match=r"text\.wav is not audio"):
        audio_info(tmp_path / "text.wav")
    with pytest.raises(UserError, match=r"empty\.flac is not audio"):
        read_audio(tmp_path / "empty.flac")
    with pytest.raises(UserError, match=r"gone\.wav: No such file"):
        read_audio(tmp_path / "gone.wav")
    with pytest.raises(UserError, match=r"asked for 10 to"):
        read_audio(recording, start=10, num_samples=10**9)
    with pytest.raises(UserError, match=r"x\.mp3: the suffix has to be one of wav, flac"):
        write_audio(tmp_path / "x.mp3", torch.zeros(1, 10), 24000)
