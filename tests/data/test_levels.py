"""Loudness and gain as the loader applies them."""

import math
from pathlib import Path

import pytest
import torch

from moss_train.audio.io import read_audio
from moss_train.audio.loudness import loudness, power_spectrum
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.sample_reader import adjust_level
from moss_train.data.stream.stream import AudioStream, ClipFormat


def clip_format(**options) -> ClipFormat:
    return ClipFormat(24000, 1, 1920, **options)


def lufs(audio: torch.Tensor) -> float:
    return loudness(power_spectrum(audio), 24000)


def test_clips_get_the_loudness_as_far_as_full_scale_allows(recordings: Path) -> None:
    for path in sorted((recordings / "speech").glob("*.flac")):
        audio = 0.1 * read_audio(path)[0]
        assert lufs(adjust_level(audio, clip_format(loudness_lufs=-40.0), 0.5)) == pytest.approx(-40, abs=0.05)
        loud = adjust_level(audio, clip_format(loudness_lufs=-3.0), 0.5)
        assert loud.abs().max() <= 1.0001
        assert lufs(loud) > lufs(audio)
    silence = torch.zeros(1, 5000)
    assert torch.equal(adjust_level(silence, clip_format(loudness_lufs=-20.0), 0.5), silence)
    hiss = torch.randn(1, 24000) * 1e-6
    assert lufs(adjust_level(hiss, clip_format(loudness_lufs=-20.0), 0.5)) == pytest.approx(lufs(hiss) + 30, abs=0.1)


def test_gain_is_drawn_between_its_limits_and_bound_to_the_position(packed: Path) -> None:
    def read(**options) -> list[torch.Tensor]:
        stream = AudioStream([packed], clip_format(**options), crop_seconds=0.9, max_seconds=8.0, seed=3)
        loader = make_loader(
            stream, text_encoder=None, position=0, updates=[(0, 40.0)], micro_batch_seconds=10.0, num_workers=0
        )
        return [row for update in loader for batch in update.micro_batches for row in batch.audio]

    plain, changed, again = read(), read(gain_db=(-12.0, -3.0)), read(gain_db=(-12.0, -3.0))
    gains = [20 * math.log10(b.abs().max() / a.abs().max()) for a, b in zip(plain, changed, strict=True) if a.any()]
    assert -12.01 <= min(gains) < -10
    assert -5 < max(gains) <= -2.99
    assert all(torch.equal(one, two) for one, two in zip(changed, again, strict=True))
