"""Read all clips of packed folders, in the order of their index."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from moss_train.batch import UpdateBatch
from moss_train.data.stream.corpus import Corpus
from moss_train.data.stream.sample_reader import ClipReader, SampleError, StreamCounter, scale_to_peak
from moss_train.utils.errors import UserError


def iterate_clips(
    sources: Sequence[str | Path], *, sampling_rate: int, num_channels: int, peak: float | None = None
) -> Iterator[tuple[str, Tensor, dict]]:
    """Yield the id, the whole audio [C, T] and the JSON of every clip, in the order of the index.

    Raises UserError with the shard and the clip if a clip cannot be read.
    """
    corpus = Corpus.load(sources, sampling_rate=sampling_rate, num_channels=num_channels)
    reader = ClipReader(sampling_rate, num_channels)
    for row in range(len(corpus)):
        location = corpus.locate(row)
        try:
            reader.check_headers(location)
            labels = reader.read_labels(location)
            audio = reader.read_audio(location, 0, location.num_samples)
        except SampleError as error:
            raise UserError(f"{location.shard}, clip at byte {location.audio_offset}: {error}") from error
        yield labels["id"], scale_to_peak(audio, peak), labels


def count_update(counter: StreamCounter, batch: UpdateBatch) -> list[str]:
    """Count one update of a single rank, and return the lines about dropped samples."""
    lines = counter.describe_dropped(batch)
    counter.add_counts(counter.counts(batch, {name for micro in batch.micro_batches for name in micro.domains}))
    return lines
