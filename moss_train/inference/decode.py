"""Decode files of codes to audio files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moss_train.audio.io import write_audio
from moss_train.inference.batching import group_by_length, read_ahead
from moss_train.inference.files import CodesInfo, Report, Work, read_codes, read_codes_header, source_of
from moss_train.model import MossAudioTokenizerModel
from moss_train.utils.errors import UserError
from moss_train.utils.files import atomic_write
from moss_train.utils.progress import progress

Codes = tuple[Tensor, CodesInfo]


@dataclass(frozen=True)
class Decoder:
    """A model with the options of `decode`; construction checks them against the model."""

    model: MossAudioTokenizerModel
    num_quantizers: int | None = None  # use only the first levels of a file; None for all
    chunk_duration: float | None = None  # seconds per streamed chunk, None for whole clips
    batch_invariant: bool = False  # the same audio, to the last bit, whatever a clip is batched with

    def __post_init__(self) -> None:
        """Decode one frame. Raises UserError for options that the model refuses."""
        try:
            levels = self.model.check_num_quantizers(self.num_quantizers)
            self.audio([torch.zeros(levels, 1, dtype=torch.int64)])
        except ValueError as error:
            raise UserError(str(error)) from error

    def read(self, work: Work) -> Codes:
        """Read codes [n, frames] and their metadata. Raises UserError when they do not fit the model."""
        codes, info = read_codes(work.source)
        self.check_format(work.source, info.sampling_rate, info.num_channels, len(codes))
        return self.check(f"{work.source}", codes, info.num_samples), info

    def check(self, name: str, codes: Tensor, num_samples: int) -> Tensor:
        """Return the levels [n, frames] to use of the codes [N, frames] of a clip, which `name` calls in errors.

        Raises UserError for codes out of range and for a number of frames that does not fit the number of samples.
        """
        try:
            self.model.check_codes(codes[:, None])
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        if codes.shape[1] != self.model.num_frames(num_samples):
            raise UserError(f"{name} has {codes.shape[1]} frames, which does not fit {num_samples} samples")
        return codes[: self.num_quantizers]

    def check_format(self, place: Path, sampling_rate: int, num_channels: int, num_levels: int) -> None:
        """Raise UserError unless the codes of a file or folder have the model's rate, channels and enough levels."""
        config = self.model.config
        if num_levels > config.num_quantizers:
            raise UserError(f"{place} has {num_levels} levels, the model has {config.num_quantizers}")
        if (self.num_quantizers or 0) > num_levels:
            raise UserError(f"{place} has {num_levels} levels, fewer than num_quantizers={self.num_quantizers}")
        if (sampling_rate, num_channels) != (config.sampling_rate, config.number_channels):
            raise UserError(
                f"{place} holds codes of {sampling_rate} Hz with {num_channels} channels, the model has codes of "
                f"{config.sampling_rate} Hz with {config.number_channels}"
            )

    def audio(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Decode codes [n, frames] of any lengths, n the same for all, as one batch; returns audio [C, T] of each."""
        output = self.model.batch_decode(
            codes, chunk_duration=self.chunk_duration, batch_invariant=self.batch_invariant, return_dict=True
        )
        assert output.audio is not None
        assert output.audio_lengths is not None
        lengths = output.audio_lengths.tolist()
        return [output.audio[index, :, :length].float().cpu() for index, length in enumerate(lengths)]


def decode_files(decoder: Decoder, works: Sequence[Work], batch_seconds: float) -> Report:
    """Decode files that have no output yet, trimmed to the clips' original lengths; unusable ones are reported.

    Args:
        batch_seconds: padded audio per batch; a longer clip is a batch of its own.
    """
    report = Report(0, 0, [])
    by_levels: dict[int, list[tuple[Work, float]]] = {}
    for work in works:
        if work.target.exists():
            report.num_present += 1
            continue
        try:
            (levels, frames), info = read_codes_header(work.source)
        except UserError as error:
            report.failures.append((work.source, str(error)))
        else:
            by_levels.setdefault(levels, []).append((work, frames / info.frame_rate))
    groups: list[list[Work]] = []
    for members in by_levels.values():
        groups += group_by_length([work for work, _ in members], [seconds for _, seconds in members], batch_seconds)
    with progress("decoding", total=sum(map(len, groups))) as bar:
        for outcomes in read_ahead(groups, decoder.read):
            clips = report.successes(outcomes, source_of)
            decode_group(decoder, [(work.target, codes, info.num_samples) for work, (codes, info) in clips], report)
            bar.advance(len(outcomes), note=f"{len(report.failures)} failed" if report.failures else None)
    return report


def decode_group(decoder: Decoder, clips: Sequence[tuple[Path, Tensor, int]], report: Report) -> None:
    """Decode clips (file to write, codes, samples at the encoder's rate before padding) as one batch, and trim them."""
    if not clips:
        return
    config = decoder.model.config
    decoded = decoder.audio([codes for _, codes, _ in clips])
    for (target, _, num_samples), audio in zip(clips, decoded, strict=True):
        with atomic_write(target) as temporary:
            write_audio(temporary, audio[:, : num_samples * config.output_ratio], config.output_sampling_rate)
        report.num_written += 1
