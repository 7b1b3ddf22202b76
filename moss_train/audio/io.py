"""Audio files in and out through libsndfile, and resampling: the only place where files become waveforms.

Waveforms are float32 [C, T] in [-1, 1], C channels, T samples.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
import torchaudio.functional
from torch import Tensor

from moss_train.utils.errors import UserError

RESAMPLER = "torchaudio.functional.resample sinc_interp_hann width 6 rolloff 0.99"
"""Name of the method behind `resample`, recorded wherever resampled audio is stored."""

WRITABLE_FORMATS = ("wav", "flac")

_SHORT_CHUNK = re.compile(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_CHUNK_SIZE = 0x7FFFF000  # at and above it: written to a pipe, the length was not known
_OGG_WITHOUT_END = "File ended unexpectedly without an End-Of-Stream flag"

AudioSource = str | Path | BinaryIO


class NamedBytes(io.BytesIO):
    """An audio file in memory that says in errors where it comes from."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file says."""

    sampling_rate: int  # Hz
    num_channels: int
    num_samples: int  # per channel
    format: str  # libsndfile's name, such as WAV or FLAC

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.num_samples / self.sampling_rate


def _describe(source: AudioSource) -> str:
    return str(source) if isinstance(source, str | Path) else getattr(source, "name", "audio in memory")


def _open(source: AudioSource) -> soundfile.SoundFile:
    try:
        # Opened by Python first: libsndfile reports every system error, a missing file included, as "System error".
        return soundfile.SoundFile(Path(source).open("rb") if isinstance(source, str | Path) else source)
    except OSError as error:
        raise UserError(f"cannot read {_describe(source)}: {error.strerror or error}") from error
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        raise UserError(f"{_describe(source)} is not audio that libsndfile can read ({reason})") from error


def _refuse_truncated(file: soundfile.SoundFile, name: str) -> None:
    """libsndfile silently shortens cut WAV, AIFF and Ogg files; only its parser's log tells."""
    log = file.extra_info
    short = _SHORT_CHUNK.search(log)
    if short is not None and int(short[2]) < int(short[1]) < _UNKNOWN_CHUNK_SIZE:
        raise UserError(f"{name} is cut off: {short[2]} of {short[1]} bytes of audio are there")
    if _OGG_WITHOUT_END in log:
        raise UserError(f"{name} is cut off: the Ogg stream has no end")


def audio_info(source: AudioSource) -> AudioInfo:
    """Read the header of an audio file. Raises UserError, naming the file, when it is missing or not audio."""
    with _open(source) as file:
        return AudioInfo(file.samplerate, file.channels, file.frames, file.format)


def read_audio(
    source: AudioSource,
    *,
    sampling_rate: int | None = None,
    num_channels: int | None = None,
    start: int = 0,
    num_frames: int | None = None,
) -> tuple[Tensor, int]:
    """Read audio as float32 [C, T] with its sampling rate, resampled and with channels converted when asked to.

    `start` and `num_frames` count samples per channel at the file's own rate; None reads to the end. Raises UserError,
    naming the file, when it cannot be read, is shorter than its header or the request says, or holds NaN or infinity.
    """
    with _open(source) as file:
        wanted = file.frames - start if num_frames is None else num_frames
        if start < 0 or wanted < 0 or start + wanted > file.frames:
            raise UserError(f"{_describe(source)} has {file.frames} samples, asked for {start} to {start + wanted}")
        try:
            _refuse_truncated(file, _describe(source))
            file.seek(start)
            samples = file.read(wanted, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise UserError(f"{_describe(source)} is damaged ({error.error_string.strip()})") from error
        rate, integers = file.samplerate, file.subtype.startswith("PCM")
    if len(samples) != wanted:
        raise UserError(f"{_describe(source)} is damaged: {len(samples)} of {wanted} samples could be read")
    if not integers and not np.isfinite(samples).all():
        raise UserError(f"{_describe(source)} contains NaN or infinite samples")
    audio = torch.from_numpy(np.ascontiguousarray(samples.T))
    if num_channels is not None:
        audio = convert_channels(audio, num_channels, _describe(source))
    if sampling_rate is not None and sampling_rate != rate:
        return resample(audio, rate, sampling_rate), sampling_rate
    return audio, rate


def convert_channels(audio: Tensor, num_channels: int, name: str = "audio") -> Tensor:
    """Convert [C, T] to `num_channels`: any number to mono by the mean, mono to any number by repetition."""
    if audio.shape[0] == num_channels:
        return audio
    if num_channels == 1:
        return audio.mean(dim=0, keepdim=True)
    if audio.shape[0] == 1:
        return audio.expand(num_channels, -1).contiguous()
    raise UserError(f"{name} has {audio.shape[0]} channels, which do not convert to {num_channels}; convert the file")


def resample(audio: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample [..., T] from one rate in Hz to another; the result has ceil(T * to_rate / from_rate) samples."""
    return torchaudio.functional.resample(audio, from_rate, to_rate)


def to_pcm16(audio: Tensor) -> Tensor:
    """Quantize [C, T] float in [-1, 1] to int16, clipping overs; what libsndfile reads back is this over 32768.

    libsndfile's own conversion multiplies by 32767, so that audio would get quieter with every read and write.
    """
    return (audio * 32768).round().clamp(-32768, 32767).to(torch.int16)


def write_audio(target: str | Path | BinaryIO, audio: Tensor, sampling_rate: int, *, format: str | None = None) -> None:
    """Write float [C, T] as 16-bit PCM; WAV or FLAC by the suffix of `target`, or by `format` for a file object."""
    if isinstance(target, str | Path):
        format = Path(target).suffix.lower().lstrip(".")
    if format not in WRITABLE_FORMATS:
        raise UserError(f"cannot write {target}: the suffix has to be one of {', '.join(WRITABLE_FORMATS)}")
    try:
        soundfile.write(
            target, to_pcm16(audio.detach().cpu()).T.numpy(), sampling_rate, subtype="PCM_16", format=format.upper()
        )
    except (OSError, soundfile.LibsndfileError) as error:
        raise UserError(f"cannot write {target}: {error}") from error
