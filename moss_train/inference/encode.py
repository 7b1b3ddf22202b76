"""Encode clips of many lengths to codes, in batches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from moss_train.audio.io import audio_info, read_audio
from moss_train.data.stream.sample_reader import scale_to_peak
from moss_train.inference.batching import group_by_length, precision_of, read_ahead
from moss_train.inference.files import CodesInfo, Report, Work, read_codes_header, source_of, write_codes
from moss_train.model import MossAudioTokenizerModel
from moss_train.utils.errors import UserError
from moss_train.utils.progress import progress


@dataclass(frozen=True)
class Encoder:
    """A model with the options of `encode`; construction checks them against the model."""

    model: MossAudioTokenizerModel
    name: str  # of the model, stored with the codes
    num_quantizers: int | None = None  # None for all levels
    chunk_duration: float | None = None  # seconds per streamed chunk, None for whole clips
    batch_invariant: bool = False  # the same codes, to the last bit, whatever a clip is batched with
    loudness: float | None = None  # RMS level in dB relative to full scale to bring clips to, None to keep theirs
    peak: float | None = None  # or the highest absolute sample to scale clips to

    def __post_init__(self) -> None:
        """Encode one silent frame. Raises UserError for options that the model refuses."""
        config = self.model.config
        try:
            self.codes([torch.zeros(config.number_channels, config.downsample_rate)])
        except ValueError as error:
            raise UserError(str(error)) from error

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the encoder's and quantizer's weights, with precision (below float32) and level appended."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            if not name.startswith("decoder."):
                first = tensor.flatten()[:64].float().cpu().numpy()
                digest.update(f"{name}{tuple(tensor.shape)}".encode() + first.tobytes())
        precision = precision_of(self.model)
        below_float32 = "" if precision == "fp32" else f"-{precision}"
        level = "" if self.loudness is None else f"{self.loudness:+g}dB"
        level += "" if self.peak is None else f"-peak{self.peak:g}"
        return digest.hexdigest()[:16] + below_float32 + level

    @property
    def num_levels(self) -> int:
        """Levels in every codes file."""
        return self.num_quantizers or self.model.config.num_quantizers

    def read(self, work: Work) -> Tensor:
        """Read a clip [C, T] at the model's rate and channels. Raises UserError if it is unreadable or empty."""
        config = self.model.config
        audio, _ = read_audio(work.source, sampling_rate=config.sampling_rate, num_channels=config.number_channels)
        if audio.shape[1] == 0:
            raise UserError(f"{work.source} has no samples")
        return audio

    def codes(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Encode clips [C, T] of any lengths as one batch; returns the codes [N, frames] of each."""
        output = self.model.batch_encode(
            [scale_to_peak(clip, self.peak) for clip in clips],
            num_quantizers=self.num_quantizers,
            chunk_duration=self.chunk_duration,
            batch_invariant=self.batch_invariant,
            loudness=self.loudness,
            return_dict=True,
        )
        assert output.audio_codes is not None
        assert output.audio_codes_lengths is not None
        lengths = output.audio_codes_lengths.tolist()
        return [output.audio_codes[:, index, :length].cpu() for index, length in enumerate(lengths)]


def encode_files(
    encoder: Encoder, works: Sequence[Work], batch_seconds: float, failures: Sequence[tuple[Path, str]] = ()
) -> Report:
    """Encode files that have no output yet, clips of similar length together; unreadable ones are reported and skipped.

    Args:
        batch_seconds: padded audio per batch; a longer clip is a batch of its own.
        failures: listed entries that are not clips, to be reported with the other failures.

    Raises:
        UserError: a codes file that is there already comes from another model or has another number of levels.
    """
    report = Report(0, 0, list(failures))
    config, precision = encoder.model.config, precision_of(encoder.model)
    rates = (config.sampling_rate, config.frame_rate)
    todo = []
    for work in works:
        if not work.target.exists():
            todo.append(work)
            continue
        (levels, _), info = read_codes_header(work.target)
        if info.precision != precision:
            raise UserError(f"{work.target} was made with precision={info.precision}; choose another out=")
        if info.fingerprint != encoder.fingerprint:
            raise UserError(
                f"{work.target} was made with other weights or another level (model={info.model}); choose another out="
            )
        if levels != encoder.num_levels:
            raise UserError(f"{work.target} has {levels} levels, not {encoder.num_levels}; choose another out=")
        report.num_present += 1
    lengths: list[tuple[Work, float]] = []
    blocks = [todo[start : start + 256] for start in range(0, len(todo), 256)]
    for headers in read_ahead(blocks, lambda work: audio_info(work.source).seconds):
        lengths += report.successes(headers, source_of)
    groups = group_by_length([work for work, _ in lengths], [seconds for _, seconds in lengths], batch_seconds)
    with progress("encoding", total=len(lengths)) as bar:
        for outcomes in read_ahead(groups, encoder.read):
            clips = report.successes(outcomes, source_of)
            all_codes = encoder.codes([clip for _, clip in clips]) if clips else []
            for (work, clip), codes in zip(clips, all_codes, strict=True):
                channels, samples = clip.shape
                info = CodesInfo(encoder.name, *rates, channels, samples, encoder.fingerprint, precision)
                write_codes(work.target, codes, info)
                report.num_written += 1
            bar.advance(len(outcomes), note=f"{len(report.failures)} failed" if report.failures else None)
    return report
