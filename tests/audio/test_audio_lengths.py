"""Files of every format, cut, joined or without their lengths: all audio is read, or an error names the file."""

import io
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from moss_train.audio.containers import page_checksum
from moss_train.audio.io import AudioInfo, NamedBytes, audio_info, read_audio
from moss_train.audio.mp3 import parse_header
from moss_train.audio.window import Remark
from moss_train.utils.errors import Fault, SampleError

RATE = 24000
NOISE = np.random.default_rng(0).standard_normal(RATE) * 0.1
SPEECH = np.concatenate([np.zeros(8000), NOISE, np.sin(np.arange(RATE) * 0.03) * 0.5]).astype(np.float32)
LONG = np.concatenate([np.roll(SPEECH, 1000 * turn) * (0.3 + 0.2 * turn) for turn in range(4)])

FORMATS: dict[str, dict] = {
    "wav": {"format": "WAV"},
    "float wav": {"format": "WAV", "subtype": "FLOAT"},
    "rf64": {"format": "RF64"},
    "w64": {"format": "W64"},
    "aiff": {"format": "AIFF"},
    "caf": {"format": "CAF"},
    "au": {"format": "AU"},
    "sphere": {"format": "NIST"},
    "flac": {"format": "FLAC"},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3"},
    "mp3 variable": {"format": "MP3", "bitrate_mode": "VARIABLE"},
    "mp3 stereo": {"format": "MP3", "bitrate_mode": "AVERAGE"},
}


def encoded(kind: str, samples: np.ndarray = SPEECH, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    if kind == "mp3 stereo":
        samples = np.stack([samples, samples[::-1]], 1)
    soundfile.write(buffer, samples, rate, **FORMATS[kind])
    return buffer.getvalue()


def read(content: bytes, **where: int) -> torch.Tensor:
    return read_audio(NamedBytes(content, "clip"), **where)[0]


def plain(content: bytes) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)[0].T.copy())


def close(audio: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Compare audio with a tolerance for decoders whose rounding depends on where decoding starts."""
    return audio.shape == wanted.shape and bool((audio - wanted).abs().max() < 2e-5)


def replaced(content: bytes, place: int, value: bytes) -> bytes:
    return content[:place] + value + content[place + len(value) :]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_file_is_read_as_it_is_and_without_a_remark(kind: str) -> None:
    content = encoded(kind)
    info = audio_info(NamedBytes(content, "clip"))
    assert close(read(content), plain(content))
    assert (info.num_samples, info.remarks) == (plain(content).shape[1], ())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_part_is_the_same_part_of_the_whole(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    path.write_bytes(encoded(kind, LONG))
    whole, _ = read_audio(path)
    for start in (0, 1, 999, 30_000, 77_777, 150_001, whole.shape[1] - 500):
        part, _ = read_audio(path, start=start, num_samples=500)
        assert close(part, whole[:, start : start + 500])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_anywhere_is_refused(kind: str) -> None:
    content = encoded(kind)
    whole = read(content)
    places = {*range(1, 60, 7), *range(60, len(content), max(1, len(content) // 50)), len(content) - 1}
    refusals: list[SampleError] = []
    for place in sorted(places):
        try:
            info, audio = audio_info(NamedBytes(content[:place], "clip")), read(content[:place])
        except SampleError as error:
            refusals.append(error)
        else:
            assert close(audio, whole) or Remark.NO_END_MARK in info.remarks, place
    assert {error.fault for error in refusals} <= {Fault.AUDIO, Fault.LENGTH}
    assert all(error.reason.startswith("clip ") for error in refusals)
    assert len(refusals) >= 0.9 * len(places)


@pytest.mark.parametrize("kind", FORMATS)
def test_joined_files_are_read_one_after_the_other(kind: str) -> None:
    first, second = encoded(kind, SPEECH), encoded(kind, SPEECH[5000:] * 0.5)
    for parts in ([first, second], [first, first], [second, first, second]):
        content = b"".join(parts)
        info = audio_info(NamedBytes(content, "clip"))
        assert info.remarks == (Remark.JOINED,)
        wanted = torch.cat([plain(part) for part in parts], 1)
        assert info.num_samples == wanted.shape[1]
        assert close(read(content), wanted)
        seam = plain(parts[0]).shape[1]
        part = read(content, start=seam - 100, num_samples=200)
        assert close(part, wanted[:, seam - 100 : seam + 100])


def test_joined_files_of_two_rates_are_refused() -> None:
    for kind in ("wav", "flac", "mp3", "vorbis"):
        with pytest.raises(SampleError, match="24000 and 16000 Hz"):
            read(encoded(kind) + encoded(kind, rate=16000))


def unknown_lengths() -> dict[str, tuple[bytes, bytes]]:
    """Return files written by programs that cannot seek back to the header, each with its correct version."""
    wav, rf64, w64, aiff, caf, au = (encoded(kind) for kind in ("wav", "rf64", "w64", "aiff", "caf", "au"))
    flac, data, ds64 = encoded("flac"), wav.index(b"data") + 4, rf64.index(b"ds64") + 16
    caf_data, ssnd, wide_data = caf.index(b"data") + 4, aiff.index(b"SSND") + 4, w64.index(b"data") + 16
    cases = {f"wav {size:#x}": replaced(wav, data, struct.pack("<I", size)) for size in (0, 0x7FFFFFFF, 0xFFFFFFFF)}
    cases |= {f"rf64 {size:#x}": replaced(rf64, ds64, struct.pack("<Q", size)) for size in (0, 2**64 - 1)}
    cases |= {f"w64 {size:#x}": replaced(w64, wide_data, struct.pack("<Q", size)) for size in (0, 24, 2**64 - 1)}
    cases |= {f"caf {size:#x}": replaced(_ended(caf), caf_data, struct.pack(">Q", size)) for size in (0, 2**64 - 1)}
    cases |= {f"au {size:#x}": replaced(au, 8, struct.pack(">I", size)) for size in (0, 0xFFFFFFFF)}
    cases |= {f"aiff {size:#x}": replaced(aiff, ssnd, struct.pack(">I", size)) for size in (0, 8, 0xFFFFFFFF)}
    cases["flac"] = replaced(flac, 18, bytes([*flac[18:21], flac[21] & 0xF0, 0, 0, 0, 0]))
    sources = {"wav": wav, "rf64": rf64, "w64": w64, "caf": caf, "au": au, "aiff": aiff, "flac": flac}
    return {name: (content, sources[name.split()[0]]) for name, content in cases.items()}


def _ended(caf: bytes) -> bytes:
    """Return the CAF file cut off after its audio."""
    place = caf.index(b"data") + 4
    return caf[: place + 8 + struct.unpack(">Q", caf[place : place + 8])[0]]


@pytest.mark.parametrize("name", unknown_lengths())
def test_a_length_that_the_header_does_not_know_is_found(name: str) -> None:
    content, source = unknown_lengths()[name]
    info = audio_info(NamedBytes(content, "clip"))
    assert info.remarks == (Remark.LENGTH_UNKNOWN,)
    assert info.num_samples == len(SPEECH)
    assert torch.equal(read(content), plain(source))
    assert torch.equal(read(content, start=40_000, num_samples=99), plain(source)[:, 40_000:40_099])


def test_silence_from_a_pipe_is_no_empty_file() -> None:
    wav = encoded("wav", SPEECH * 0)
    piped = replaced(wav, wav.index(b"data") + 4, bytes(4))
    assert audio_info(NamedBytes(piped, "clip")).num_samples == len(SPEECH)
    empty = encoded("wav", SPEECH[:0]) + b"LIST" + struct.pack("<I", 4) + b"INFO"
    assert audio_info(NamedBytes(empty, "clip")) == AudioInfo(RATE, 1, 0, "WAV")


@pytest.mark.parametrize("kind", ["wav", "rf64", "aiff", "caf", "au", "sphere"])
def test_a_length_that_is_too_small_is_not_believed(kind: str) -> None:
    content = encoded(kind)
    size = struct.pack("<I", 12000), struct.pack(">I", 12000), struct.pack("<Q", 12000), struct.pack(">Q", 12000)
    smaller = {
        "wav": lambda: replaced(content, content.index(b"data") + 4, size[0]),
        "rf64": lambda: replaced(content, content.index(b"ds64") + 16, size[2]),
        "aiff": lambda: replaced(content, content.index(b"SSND") + 4, size[1]),
        "caf": lambda: replaced(content, content.index(b"data") + 4, size[3]),
        "au": lambda: replaced(content, 8, size[1]),
        "sphere": lambda: content.replace(b"sample_count -i 56000", b"sample_count -i 12000"),
    }[kind]()
    assert smaller != content
    with pytest.raises(SampleError, match=r"clip has \d+ bytes behind"):
        read(smaller)


def test_chunks_and_tags_behind_the_audio_are_no_damage() -> None:
    wav, flac, mp3 = encoded("wav"), encoded("flac"), encoded("mp3")
    tag = b"TAG" + bytes(125)
    for content, source in (
        (wav + b"LIST" + struct.pack("<I", 10) + b"INFOISFT\0\0", wav),
        (wav + b"id3 " + struct.pack("<I", 3) + b"abc", wav),  # without the padding
        (wav + tag, wav),
        (wav + bytes(700), wav),
        (flac + tag, flac),
        (mp3 + tag, mp3),
        (mp3 + bytes(300), mp3),
        (b"ID3\x04\0\0\0\0\x01\x00" + bytes(128) + mp3, mp3),
        (encoded("vorbis") + tag, encoded("vorbis")),
    ):
        assert close(read(content), plain(source))


def without_header(mp3: bytes) -> bytes:
    frame = parse_header(mp3[:4])
    assert frame is not None
    return mp3[frame.size :]


@pytest.mark.parametrize("kind", ["mp3", "mp3 variable", "mp3 stereo"])
def test_an_mp3_file_without_a_header_is_read_to_its_end(kind: str) -> None:
    content = encoded(kind, LONG)
    whole, bare = plain(content), read(without_header(content))
    delay = 1105  # encoder delay, which is only in the header
    assert bare.shape[1] >= whole.shape[1] + delay - 529
    assert close(bare[:, 576 : 576 + whole.shape[1]], whole)
    part = read(without_header(content), start=100_000, num_samples=3000)
    assert close(part, bare[:, 100_000:103_000])


def test_an_mp3_header_with_a_false_count_is_not_believed() -> None:
    content = encoded("mp3", LONG)
    place = content.index(b"Info") if b"Info" in content[:200] else content.index(b"Xing")
    fewer = replaced(content, place + 8, struct.pack(">I", 20))
    assert audio_info(NamedBytes(fewer, "clip")).num_samples >= len(LONG)
    assert close(read(fewer)[:, 576 : 576 + len(LONG)], plain(content))
    with pytest.raises(SampleError, match=r"cut off: \d+ of 1000 frames"):
        read(replaced(content, place + 8, struct.pack(">I", 1000)))


def test_an_ogg_file_without_its_end_flag_is_read_with_a_remark() -> None:
    content = encoded("opus")
    last = content.rindex(b"OggS")
    page = replaced(content[last:], 5, bytes([content[last + 5] & ~4]))
    page = replaced(page, 22, struct.pack("<I", page_checksum(page)))
    open_ended = content[:last] + page
    assert audio_info(NamedBytes(open_ended, "clip")).remarks == (Remark.NO_END_MARK,)
    assert read(open_ended).shape[1] >= len(SPEECH)


def test_a_damaged_page_of_ogg_is_refused() -> None:
    content = encoded("opus")
    with pytest.raises(SampleError, match="checksum of the page of Ogg"):
        read(replaced(content, len(content) // 2, b"\x00\x01\x02"))
    first, second = (place for place in (content.index(b"OggS", 4), content.index(b"OggS", 900)))
    with pytest.raises(SampleError, match="pages of Ogg are missing"):
        read(content[:second] + content[content.index(b"OggS", second + 4) :])
    assert first < second


def test_memory_does_not_depend_on_what_a_header_says(tmp_path: Path) -> None:
    flac = encoded("flac")
    endless = replaced(flac, 18, bytes([*flac[18:21], flac[21] | 0x0F, 0xFF, 0xFF, 0xFF, 0xFF]))
    (tmp_path / "clip.flac").write_bytes(endless)
    tracemalloc.start()
    with pytest.raises(SampleError, match=r"clip\.flac is damaged"):
        read_audio(tmp_path / "clip.flac")
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "the first is number 1"), (1e29, "1e"), (15000, "1.5e")])
def test_values_that_are_no_audio_are_refused(value: float, reason: str) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array([0.0, value, 0.5], np.float32), RATE, format="WAV", subtype="FLOAT")
    with pytest.raises(SampleError, match=reason) as found:
        read(buffer.getvalue())
    assert found.value.fault == Fault.VALUES


def test_info_of_an_empty_recording() -> None:
    assert audio_info(NamedBytes(encoded("wav", SPEECH[:0]), "clip")) == AudioInfo(RATE, 1, 0, "WAV")
