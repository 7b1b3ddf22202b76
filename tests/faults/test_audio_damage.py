"""Audio files damaged in every way: packed unchanged, or skipped with the reason, never silently altered."""

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from moss_train.config.schema import PackConfig
from moss_train.data.pack.manifest import SourceClip, list_clips
from moss_train.data.pack.pack import pack
from moss_train.data.pack.preprocess import SkippedClip, preprocess_clip
from moss_train.data.shards.format import EncodedClip
from tests.data.packed_clips import iterate_clips

from .harness import SCALE

pytestmark = pytest.mark.faults

RATE = 24000
SPEECH = np.sin(np.arange(RATE) * 0.1).astype(np.float32) * np.linspace(0.1, 0.8, RATE, dtype=np.float32)


def encoded(samples: np.ndarray = SPEECH, format: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def wav_with_rate(rate: int) -> bytes:
    content = bytearray(encoded())
    content[24:28] = struct.pack("<I", rate)
    return bytes(content)


def wav_that_claims(num_bytes: int) -> bytes:
    content = bytearray(encoded())
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", num_bytes)
    return bytes(content)


UNREADABLE: dict[str, Callable[[], bytes]] = {
    "no bytes": lambda: b"",
    "random bytes": lambda: np.random.default_rng(0).bytes(5000),
    "text": lambda: b"this is not audio\n" * 50,
    "a web page": lambda: b"<html><body>404 Not Found</body></html>",
    "a cut WAV": lambda: encoded()[:-1000],
    "half a FLAC": lambda: encoded(format="FLAC")[: len(encoded(format="FLAC")) // 2],
    "a FLAC with a flipped bit": lambda: flipped(encoded(format="FLAC")),
    "half an Ogg": lambda: encoded(format="OGG")[: len(encoded(format="OGG")) // 2],
    "half an Opus": lambda: encoded(format="OGG", subtype="OPUS")[: len(encoded(format="OGG", subtype="OPUS")) // 2],
    "an AIFF cut in its data": lambda: encoded(format="AIFF")[:-1000],
    "a WAV that claims 2 GB": lambda: wav_that_claims(2_000_000_000),
    "a WAV of 1 Hz": lambda: wav_with_rate(1),
    "a WAV of 1.5 MHz": lambda: wav_with_rate(1_500_000),
    "NaN": lambda: encoded(np.where(np.arange(RATE) == 50, np.nan, SPEECH), subtype="FLOAT"),
    "infinity": lambda: encoded(np.where(np.arange(RATE) == 50, np.inf, SPEECH), subtype="FLOAT"),
    "1e30": lambda: encoded(np.where(np.arange(RATE) == 50, 1e30, SPEECH), subtype="FLOAT"),
    "integers in a float file": lambda: encoded(SPEECH * 32768, subtype="FLOAT"),
}
TOO_SHORT: dict[str, Callable[[], bytes]] = {
    "a header alone": lambda: encoded(SPEECH[:0]),
    "one sample": lambda: encoded(SPEECH[:1]),
    "less than a frame": lambda: encoded(SPEECH[:1919]),
}
USABLE: dict[str, Callable[[], bytes]] = {
    "unsigned 8 bit": lambda: encoded(subtype="PCM_U8"),
    "24 bit": lambda: encoded(subtype="PCM_24"),
    "32 bit": lambda: encoded(subtype="PCM_32"),
    "double": lambda: encoded(subtype="DOUBLE"),
    "mu-law": lambda: encoded(subtype="ULAW"),
    "stereo": lambda: encoded(np.stack([SPEECH, SPEECH], 1)),
    "eight channels": lambda: encoded(np.stack([SPEECH] * 8, 1)),
    "8 kHz": lambda: encoded(rate=8000),
    "44.1 kHz": lambda: encoded(rate=44100),
    "48 kHz": lambda: encoded(rate=48000),
    "Opus": lambda: encoded(format="OGG", subtype="OPUS"),
    "MP3": lambda: encoded(format="MP3"),
    "silence": lambda: encoded(SPEECH * 0),
    "a constant": lambda: encoded(SPEECH * 0 + 0.5),
    "a clipped square wave": lambda: encoded(np.sign(SPEECH)),
    "an impulse": lambda: encoded((np.arange(RATE) == 7).astype(np.float32)),
    "denormal numbers": lambda: encoded(SPEECH * 1e-42, subtype="FLOAT"),
    "overs": lambda: encoded(SPEECH * 3, subtype="FLOAT"),
}


def flipped(content: bytes) -> bytes:
    data = bytearray(content)
    data[len(data) // 2] ^= 4
    return bytes(data)


def prepared(tmp_path: Path, content: bytes) -> object:
    (tmp_path / "clip.bin").write_bytes(content)
    return preprocess_clip(SourceClip(tmp_path / "clip.bin", "clip", "speech"), PackConfig("in", "out"))


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_trusted_is_left_out_with_file_and_reason(tmp_path: Path, kind: str) -> None:
    outcome = prepared(tmp_path, UNREADABLE[kind]())
    assert isinstance(outcome, SkippedClip)
    assert outcome.kind == "unreadable"
    assert "clip.bin" in outcome.reason
    assert len(outcome.reason.splitlines()) == 1


@pytest.mark.parametrize("kind", TOO_SHORT)
def test_what_is_too_short_is_counted_as_such(tmp_path: Path, kind: str) -> None:
    assert prepared(tmp_path, TOO_SHORT[kind]()) == SkippedClip("too short")


@pytest.mark.parametrize("kind", USABLE)
def test_odd_but_sound_audio_keeps_its_length_and_stays_finite(tmp_path: Path, kind: str) -> None:
    content = USABLE[kind]()
    info = soundfile.info(io.BytesIO(content))
    outcome = prepared(tmp_path, content)
    assert isinstance(outcome, EncodedClip)
    samples, rate = soundfile.read(io.BytesIO(outcome.flac), dtype="float32")
    assert rate == RATE
    assert samples.shape == (-(-info.frames * RATE // info.samplerate),)
    assert outcome.num_samples == len(samples)
    assert np.isfinite(samples).all()
    assert np.abs(samples).max() <= 1.0


def test_a_compressed_file_damaged_anywhere_is_never_silently_shortened(tmp_path: Path) -> None:
    """FLAC with one byte altered, or cut, anywhere: the audio is that of the whole file, or the file is skipped."""
    content = encoded(format="FLAC")
    whole = prepared(tmp_path, content)
    assert isinstance(whole, EncodedClip)
    generator = np.random.default_rng(1)
    lost = 0
    for offset in generator.integers(0, len(content), 40 * SCALE):
        altered = bytearray(content)
        altered[offset] ^= 1 << int(generator.integers(8))
        for damaged in (bytes(altered), content[:offset]):
            outcome = prepared(tmp_path, damaged)
            if isinstance(outcome, EncodedClip):
                assert outcome.flac == whole.flac
            else:
                lost += 1
    assert lost > 60 * SCALE


def test_one_bad_file_among_good_ones_loses_nothing_else(tmp_path: Path) -> None:
    """All kinds in one folder: exactly the valid files are packed and can be read back."""
    folder = tmp_path / "audio"
    folder.mkdir()
    everything = {**UNREADABLE, **TOO_SHORT, **USABLE}
    for kind, make in everything.items():
        (folder / f"{kind.replace(' ', '_')}.wav").write_bytes(make())
    options = PackConfig(folder, tmp_path / "out", max_invalid_fraction=1.0, num_workers=1)
    report = pack(list_clips(folder, "speech"), options)
    found = {name for name, _, _ in iterate_clips([tmp_path / "out"], sampling_rate=RATE, num_channels=1)}
    assert found == {f"{kind.replace(' ', '_')}.wav" for kind in USABLE}
    assert len(report.invalid) == len(UNREADABLE)
    assert json.loads((tmp_path / "out" / "index.json").read_text())["num_samples"] == len(USABLE)
