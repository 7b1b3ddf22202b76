"""Read, write and resample audio, with libsndfile for files: the only place where files become waveforms.

Waveforms are float32 [C, T] in [-1, 1], C channels, T samples.
"""

import io
import math
import os
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from moss_train.audio.containers import scan
from moss_train.audio.window import DamagedError, Piece, PieceFile, Remark, Window
from moss_train.utils.errors import Fault, SampleError, UserError
from moss_train.utils.files import special_kind

RESAMPLER = "torchaudio.functional.resample sinc_interp_hann width 6 rolloff 0.99"
"""Name of the method behind `resample`, recorded wherever resampled audio is stored."""

WRITABLE_FORMATS = ("wav", "flac")

PEAK_LIMIT = 8.0
"""Largest plausible absolute sample: beyond it a file holds, say, integers stored as floats, not audio with overs."""

CONVERTIBLE_SUFFIXES = frozenset(f".{name}" for name in "3gp aac amr m4a m4b mka mkv mov mp4 webm wma".split())  # noqa: SIM905
"""Formats of phones and browsers, which libsndfile does not read."""

AudioSource = str | Path | BinaryIO


class NamedBytes(io.BytesIO):
    """An audio file in memory, with a name for error messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


@dataclass(frozen=True)
class AudioInfo:
    """Properties of an audio file."""

    sampling_rate: int  # Hz
    num_channels: int
    num_samples: int  # per channel
    format: str  # libsndfile's name, such as WAV or FLAC
    remarks: tuple[Remark, ...] = ()  # oddities to report to the user

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.num_samples / self.sampling_rate


class _Recording:
    """An open audio file, all its pieces together read as one recording. A context manager."""

    def __init__(self, source: AudioSource, is_whole: bool) -> None:
        self.name = str(source) if isinstance(source, str | Path) else getattr(source, "name", "audio in memory")
        self._file, self._owned = _open_bytes(source, self.name), isinstance(source, str | Path)
        try:
            pieces = self._find_pieces(source, is_whole)
            remarks = [piece.remark for piece in pieces] + ([Remark.JOINED] if len(pieces) > 1 else [])
            self.remarks = tuple(dict.fromkeys(remark for remark in remarks if remark is not None))
            self._first = first = self._open(pieces[0])
            self.rate, self.channels, self.format, self.subtype = _format(first)
            self.parts = [(pieces[0], self._length(first, pieces[0]))]  # each piece with its number of samples
            for piece in pieces[1:]:
                with self._open(piece) as file:
                    if _format(file) != _format(first):
                        raise SampleError(
                            Fault.AUDIO,
                            f"{self.name} is several files joined together, of {self.rate} and {file.samplerate} Hz, "
                            f"{self.channels} and {file.channels} channels; take them apart",
                        )
                    self.parts.append((piece, self._length(file, piece)))
            self.num_samples = sum(num_samples for _, num_samples in self.parts)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> "_Recording":
        return self

    def __exit__(self, *_: object) -> None:
        self._first.close()
        self._close()

    def _close(self) -> None:
        if self._owned:
            self._file.close()

    def _find_pieces(self, source: AudioSource, is_whole: bool) -> list[Piece]:
        """Return the pieces; those of a file on disk are cached, because parts of it are often read one by one."""
        try:
            if is_whole:
                return [Piece(0, self._file.seek(0, os.SEEK_END))]
            if not isinstance(source, str | Path):
                return scan(Window(self._file))
            status = os.fstat(self._file.fileno())
            return _scan_file(str(source), (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        except DamagedError as error:
            raise SampleError(Fault.AUDIO, f"{self.name} {error}") from error
        except OSError as error:
            raise SampleError(Fault.FILE, f"cannot read {self.name}: {error.strerror or error}") from error

    def _open(self, piece: Piece) -> soundfile.SoundFile:
        self._file.seek(0)
        is_all = not piece.head and piece.begin == 0 and piece.end == self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        try:
            return soundfile.SoundFile(self._file if is_all else io.BufferedReader(PieceFile(self._file, piece)))
        except soundfile.LibsndfileError as error:
            reason, path = error.error_string.strip().rstrip("."), Path(self.name)
            advice = ""
            if path.suffix.lower() in CONVERTIBLE_SUFFIXES:
                target = shlex.quote(str(path.with_suffix(".flac")))
                advice = f"; convert it: ffmpeg -i {shlex.quote(self.name)} {target}"
            raise SampleError(
                Fault.AUDIO, f"{self.name} is not audio that libsndfile can read ({reason}){advice}"
            ) from error

    def _length(self, file: soundfile.SoundFile, piece: Piece) -> int:
        num_samples = file.frames
        if num_samples >= _ENDLESS:
            num_samples = sum(len(block) for block in _blocks(file, _ENDLESS, self.name))
            file.seek(0)
        if piece.num_samples not in (None, num_samples):
            raise SampleError(
                Fault.LENGTH,
                f"{self.name} has {piece.num_samples} samples by its frames, {num_samples} by its header; convert it",
            )
        return num_samples

    def read(self, start: int, count: int) -> np.ndarray:
        """Read `count` samples from `start` on, float32 [samples, channels]. Raises SampleError if they are damaged."""
        blocks: list[np.ndarray] = []
        begin = 0
        for piece, num_samples in self.parts:
            first, last = max(start, begin), min(start + count, begin + num_samples)
            if first < last:
                blocks += self._read_part(piece, num_samples, first - begin, last - first)
            begin += num_samples
        if not blocks:
            return np.zeros((0, self.channels), np.float32)
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def _read_part(self, piece: Piece, num_samples: int, start: int, count: int) -> list[np.ndarray]:
        skipped = start
        # libsndfile seeks to a wrong sample in MP3 and near the end of Vorbis, and soundfile seeks after every read: so
        # these formats are read in one call.
        at_once = self.format in ("OGG", "MP3")
        is_sought = piece.piece_at is None
        if piece.piece_at is not None:
            piece, skipped = piece.piece_at(start)
        elif at_once and start + _MARGIN > num_samples - _MARGIN:
            skipped = min(start, _MARGIN)
        elif at_once:
            skipped = 0
        file = self._first if piece is self.parts[0][0] else self._open(piece)
        try:
            if is_sought:
                file.seek(start - skipped if at_once else start)
            if at_once:
                samples = file.read(skipped + count, dtype="float32", always_2d=True)
                if len(samples) != skipped + count:
                    found = max(0, len(samples) - skipped)
                    raise SampleError(Fault.AUDIO, f"{self.name} is damaged: {found} of {count} samples could be read")
                return [samples[skipped:]]
            return list(_blocks(file, count, self.name))
        except soundfile.LibsndfileError as error:
            raise SampleError(Fault.AUDIO, f"{self.name} is damaged ({error.error_string.strip()})") from error
        finally:
            if file is not self._first:
                file.close()


@lru_cache(maxsize=64)
def _scan_file(path: str, state: tuple[int, ...]) -> list[Piece]:
    """Return the pieces of a file, cached until it changes: `state` is different then."""
    with open(path, "rb") as file:
        return scan(Window(file))


_MARGIN = 2**19  # samples at the end of an Ogg file in which no seek ends
_ENDLESS = 2**62  # libsndfile reports this many samples or more when it does not know the number


def _format(file: soundfile.SoundFile) -> tuple[int, int, str, str]:
    return file.samplerate, file.channels, file.format, file.subtype


def _blocks(file: soundfile.SoundFile, count: int, name: str) -> Iterator[np.ndarray]:
    """Yield `count` samples from the current position on (all for `_ENDLESS`) as float32 [samples, channels]."""
    limit = max(1, 2**22 // file.channels)  # samples per read, so that a wrong header cannot exhaust the memory
    done = 0
    while done < count:
        block = file.read(min(limit, count - done), dtype="float32", always_2d=True)
        done += len(block)
        if len(block):
            yield block
        elif count >= _ENDLESS:
            return
        else:
            raise SampleError(Fault.AUDIO, f"{name} is damaged: {done} of {count} samples could be read")


def _open_bytes(source: AudioSource, name: str) -> BinaryIO:
    """Open a file. Raises SampleError unless it is a regular file: opening a pipe could block forever."""
    if not isinstance(source, str | Path):
        return source
    try:
        kind = special_kind(Path(source))
        if kind is None:
            # Opened by Python, because libsndfile reports every system error, even a missing file, as "System error".
            return Path(source).open("rb")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        fault = Fault.MISSING_FILE if isinstance(error, FileNotFoundError) else Fault.FILE
        raise SampleError(fault, f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    raise SampleError(Fault.SPECIAL_FILE, f"{name} is {kind}, not a file")


def audio_info(source: AudioSource) -> AudioInfo:
    """Return the properties of an audio file, found by scanning its bytes: the header may be wrong.

    Raises SampleError, naming the file, if it is missing, not audio, cut off, or of unknown length.
    """
    with _Recording(source, is_whole=False) as file:
        return AudioInfo(file.rate, file.channels, file.num_samples, file.format, file.remarks)


def read_audio(
    source: AudioSource,
    *,
    sampling_rate: int | None = None,
    num_channels: int | None = None,
    start: int = 0,
    num_samples: int | None = None,
    is_whole: bool = False,
) -> tuple[Tensor, int]:
    """Read audio as float32 [C, T] with its sampling rate, resampled and with channels converted when asked to.

    `start` and `num_samples` count samples per channel at the file's own rate; None reads to the end. `is_whole`: the
    file was written by `pack`, so its header is right and the scan of its bytes is skipped. Raises SampleError, naming
    the file, if it cannot be read, is shorter than its header states or than requested, or holds samples that are NaN,
    infinite or far above full scale.
    """
    with _Recording(source, is_whole) as file:
        wanted = file.num_samples - start if num_samples is None else num_samples
        if start < 0 or wanted < 0 or start + wanted > file.num_samples:
            raise SampleError(
                Fault.AUDIO, f"{file.name} has {file.num_samples} samples, asked for {start} to {start + wanted}"
            )
        samples = file.read(start, wanted)
        rate, name = file.rate, file.name
        if not file.subtype.startswith("PCM"):
            peak = max(samples.max(initial=0.0), -samples.min(initial=0.0))  # NaN if a sample is NaN
            if not np.isfinite(peak):
                first = start + int(np.flatnonzero(~np.isfinite(samples).all(axis=1))[0])
                raise SampleError(Fault.VALUES, f"{name} contains NaN or infinite samples, the first is number {first}")
            if peak > PEAK_LIMIT:
                raise SampleError(Fault.VALUES, f"{name} has samples up to {peak:.3g}; audio has to lie in [-1, 1]")
    audio = torch.from_numpy(np.ascontiguousarray(samples.T))
    if num_channels is not None:
        audio = convert_channels(audio, num_channels, name)
    if sampling_rate is not None and sampling_rate != rate:
        return resample(audio, rate, sampling_rate), sampling_rate
    return audio, rate


def convert_channels(audio: Tensor, num_channels: int, name: str = "audio") -> Tensor:
    """Convert [C, T] to `num_channels`: to mono by the mean, from mono by repetition. Raises UserError otherwise."""
    if audio.shape[0] == num_channels:
        return audio
    if num_channels == 1:
        return audio.mean(dim=0, keepdim=True)
    if audio.shape[0] == 1:
        return audio.expand(num_channels, -1).contiguous()
    raise UserError(f"{name} has {audio.shape[0]} channels, which do not convert to {num_channels}; convert the file")


_FILTER_WIDTH, _ROLLOFF = 6, 0.99  # torchaudio's defaults: zero crossings to each side, part of the band that is kept
_LARGEST_FILTER_BANK = 2**25  # weights, of which torchaudio holds several copies in float64


def resample(audio: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample [..., T] from one rate in Hz to another; the result has ceil(T * to_rate / from_rate) samples."""
    import torchaudio.functional  # imported here, because many commands never resample

    if from_rate == to_rate:
        return audio
    common = math.gcd(from_rate, to_rate)
    old, new = from_rate // common, to_rate // common
    num_samples = -(-audio.shape[-1] * new // old)
    if not audio.numel():
        return audio.new_zeros(*audio.shape[:-1], num_samples)
    if old * new > _LARGEST_FILTER_BANK:
        return _resample_one_by_one(audio, old, new, num_samples)
    result = torchaudio.functional.resample(audio, old, new, _FILTER_WIDTH, _ROLLOFF)
    if result.shape[-1] < num_samples:  # torchaudio computes the length in float32
        spare = old + audio.shape[-1] // 2**20
        result = torchaudio.functional.resample(F.pad(audio, (0, spare)), old, new, _FILTER_WIDTH, _ROLLOFF)
    return result[..., :num_samples]


def _resample_one_by_one(audio: Tensor, old: int, new: int, num_samples: int) -> Tensor:
    """Resample [..., T] with torchaudio's filter, computed for each sample of the result.

    torchaudio makes a filter of `old` weights for each of `new` phases first: 10 GB from 44,101 to 24,000 Hz.
    """
    scale = min(old, new) * _ROLLOFF / old  # zero crossings per sample of `audio`
    width = math.ceil(_FILTER_WIDTH / scale)
    taps = torch.arange(-width, width + 1, dtype=torch.float64)
    frames = F.pad(audio.reshape(-1, audio.shape[-1]), (width, width)).unfold(-1, len(taps), 1)  # [N, T, taps], a view
    parts = []
    for numbers in torch.arange(num_samples).split(max(1, 2**22 // len(taps))):
        places = numbers * old
        distances = (taps - (places % new)[:, None].double() / new).mul_(scale).clamp_(-_FILTER_WIDTH, _FILTER_WIDTH)
        weights = torch.sinc(distances) * torch.cos(distances * (math.pi / 2 / _FILTER_WIDTH)).square() * scale
        parts.append((frames[:, places // new] * weights.to(audio)).sum(-1))
    return torch.cat(parts, -1).reshape(*audio.shape[:-1], num_samples)


def to_pcm16(audio: Tensor) -> Tensor:
    """Quantize [C, T] float in [-1, 1] to int16, clipping overs; libsndfile divides by 32768 on reading.

    libsndfile's own conversion on writing multiplies by 32767, so audio would get quieter with every write and read.
    """
    return (audio * 32768).round().clamp(-32768, 32767).to(torch.int16)


def write_audio(target: str | Path | BinaryIO, audio: Tensor, sampling_rate: int, *, format: str | None = None) -> None:
    """Write float [C, T] as 16-bit PCM; WAV or FLAC by the suffix of `target`, or by `format` for a file object."""
    if isinstance(target, str | Path):
        format = Path(target).suffix.lower().lstrip(".")
    if format not in WRITABLE_FORMATS:
        raise UserError(f"cannot write {target}: the suffix has to be one of {', '.join(WRITABLE_FORMATS)}")
    try:
        with Path(target).open("wb") if isinstance(target, str | Path) else nullcontext(target) as file:
            samples = to_pcm16(audio.detach().cpu()).T.numpy()
            encoded = io.BytesIO()  # because libsndfile's callbacks would print the error of a full disk and lose it
            soundfile.write(encoded, samples, sampling_rate, subtype="PCM_16", format=format.upper())
            file.write(encoded.getbuffer())
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"cannot write {target}: {error}") from error
