"""Preprocess one file: read, check, split when it is long, resample, encode as FLAC."""

import io
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from moss_train.audio.io import AudioSource, audio_info, read_audio, resample, write_audio
from moss_train.audio.window import Remark
from moss_train.config.schema import PackConfig
from moss_train.data.pack.list_formats import open_row
from moss_train.data.pack.manifest import SourceClip
from moss_train.data.shards.format import EncodedClip
from moss_train.utils.errors import Fault, SampleError, UserError, fault_of

SILENT = "of digital silence"

RATE_LIMITS = (2000, 768_000)
"""Lowest and highest plausible sampling rate in Hz; anything else is taken as a damaged header."""

END_TOLERANCE = 0.01
"""Seconds by which the end of a clip may exceed its recording, as happens with rounded times; it then ends there."""

_RESAMPLER_REACH = 16  # samples at the lower rate, to each side, that may affect a resampled sample; a generous bound


@dataclass(frozen=True)
class SkippedClip:
    """A clip that is not stored."""

    kind: str  # too short, too long, silent or unreadable
    reason: str = ""
    fault: Fault = Fault.OTHER  # for unreadable clips


def preprocess_clip(clip: SourceClip, options: PackConfig) -> EncodedClip | SkippedClip | tuple[range, ...]:
    """Return a clip ready to be stored, or a SkippedClip with the reason when the file cannot be used.

    For a long clip without text, only its segments are returned, as ranges of samples of its file; each is then to be
    processed by `preprocess_segment`.
    """
    try:
        source, rate, begin, num_samples, remarks = find_extent(clip)
        seconds = num_samples / rate
        if options.segment_seconds is not None and seconds > options.segment_seconds and clip.text is None:
            return split_into_segments(begin, num_samples, rate, options)
        if options.max_seconds is not None and seconds > options.max_seconds:
            return SkippedClip("too long")
        length = None if begin == 0 and clip.end_seconds is None else num_samples
        audio, _ = read_audio(source, num_channels=options.num_channels, start=begin, num_samples=length)
        return _finish(audio, rate, clip.id, options, remarks)
    except UserError as error:
        return SkippedClip("unreadable", str(error), fault_of(error))


def preprocess_segment(segment: range, clip: SourceClip, options: PackConfig) -> EncodedClip | SkippedClip:
    """Prepare one segment of a long clip for storing, as if the whole clip had been resampled and then split."""
    try:
        source, rate, begin, num_samples, remarks = find_extent(clip)
        unit, out_unit = _units(rate, options.sampling_rate)
        margin = unit * math.ceil(_RESAMPLER_REACH * max(1, unit / out_unit) / unit)
        left = min(margin, segment.start - begin)
        right = min(margin, begin + num_samples - segment.stop)
        start, length = segment.start - left, left + len(segment) + right
        audio, _ = read_audio(source, num_channels=options.num_channels, start=start, num_samples=length)
        if rate != options.sampling_rate:
            audio = resample(audio, rate, options.sampling_rate)
        skipped = left // unit * out_unit
        audio = audio[:, skipped : skipped + math.ceil(len(segment) * out_unit / unit)]
        segment_id = f"{clip.id}#{segment.start / rate:.3f}"
        told = remarks if segment.start == begin else ()  # reported once per recording
        return _finish(audio, options.sampling_rate, segment_id, options, told)
    except UserError as error:
        return SkippedClip("unreadable", str(error), fault_of(error))


class Extent(NamedTuple):
    """Where a clip lies in its file, in samples at the file's rate."""

    source: AudioSource  # the file, or the bytes of one row of a saved dataset
    rate: int  # Hz
    begin: int
    num_samples: int
    remarks: tuple[Remark, ...]


def find_extent(clip: SourceClip) -> Extent:
    """Locate a clip in its file.

    Raises SampleError if it exceeds the file by more than END_TOLERANCE, or if the sampling rate is not plausible.
    """
    source: AudioSource = clip.path if clip.row is None else open_row(clip.path, clip.row)
    info = audio_info(source)
    if not isinstance(source, str | Path):
        source.seek(0)
    rate, remarks = info.sampling_rate, info.remarks
    if not RATE_LIMITS[0] <= rate <= RATE_LIMITS[1]:
        reason = f"{clip.path} has a sampling rate of {rate} Hz, outside {RATE_LIMITS[0]} to {RATE_LIMITS[1]}"
        raise SampleError(Fault.AUDIO, reason)
    begin = round(clip.start_seconds * rate)
    end = info.num_samples if clip.end_seconds is None else round(clip.end_seconds * rate)
    if info.num_samples < end <= info.num_samples + END_TOLERANCE * rate:
        end, remarks = info.num_samples, (*remarks, Remark.CLAMPED)
    if not begin <= end <= info.num_samples:
        reason = f"{clip.path} has {info.seconds:.3f} s, asked for {clip.start_seconds:.3f} to {end / rate:.3f} s"
        raise SampleError(Fault.LENGTH, reason)
    return Extent(source, rate, begin, end - begin, remarks)


def split_into_segments(begin: int, num_samples: int, rate: int, options: PackConfig) -> tuple[range, ...]:
    """Split samples of a file into about equal segments of at most `segment_seconds`, where samples of both rates
    coincide.
    """
    assert options.segment_seconds is not None
    unit, _ = _units(rate, options.sampling_rate)
    count = math.ceil(num_samples / max(unit, math.floor(options.segment_seconds * rate / unit) * unit))
    places = [round(num_samples * index / count / unit) * unit for index in range(count)] + [num_samples]
    return tuple(range(begin + first, begin + last) for first, last in itertools.pairwise(places))


def _units(rate: int, wanted_rate: int) -> tuple[int, int]:
    """Return the shortest stretch that is a whole number of samples at both rates, in samples of each."""
    common = math.gcd(rate, wanted_rate)
    return rate // common, wanted_rate // common


def _finish(
    audio: Tensor, rate: int, clip_id: str, options: PackConfig, remarks: tuple[Remark, ...]
) -> EncodedClip | SkippedClip:
    """Check, resample and encode audio [C, T]."""
    if rate != options.sampling_rate:
        audio = resample(audio, rate, options.sampling_rate)
    seconds = audio.shape[-1] / options.sampling_rate
    if seconds < options.min_seconds or seconds == 0:
        return SkippedClip("too short")
    if options.min_level_db is not None and level_db(audio) < options.min_level_db:
        return SkippedClip("silent")
    flac = io.BytesIO()
    write_audio(flac, audio, options.sampling_rate, format="flac")
    return EncodedClip(clip_id, flac.getvalue(), audio.shape[-1], remarks if audio.any() else (*remarks, SILENT))


def level_db(audio: Tensor) -> float:
    """Return the root mean square of [C, T] in dB below full scale; -inf for digital silence."""
    power = audio.square().mean().item()
    return 10 * math.log10(power) if power > 0 else -math.inf
