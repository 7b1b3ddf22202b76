"""The training stream: an endless sequence of clips, each a function of (seed, position).

`position` is the number of clips consumed, the only integer that a resume needs. Ranks and workers never change the
sequence. A clip may come again, whole or with another crop. Lengths in "samples" are audio samples.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from moss_train.data.shards.index import ClipLocation
from moss_train.data.stream.corpus import Corpus, DomainMixture, DomainOrder, domain_shares, uniforms


@dataclass(frozen=True)
class ClipFormat:
    """Audio format of the clips for a model; the model's configuration and `config.DataConfig` validate the values."""

    sampling_rate: int  # Hz, of the encoder
    num_channels: int
    hop_length: int  # samples per frame at that rate; batches are padded to whole frames
    peak: float | None = None  # audio is scaled so that its highest absolute sample is this; silence stays silent
    loudness_lufs: float | None = None  # or so that its loudness is this, as far as full scale allows
    gain_db: Sequence[float] | None = None  # then by a random gain between these, as far as full scale allows
    output_sampling_rate: int | None = None  # Hz, of the decoder, a multiple of the encoder's; None: the encoder's

    @property
    def stored_rate(self) -> int:
        """Sampling rate of the clips in the shards: the decoder's, from which the encoder's input is resampled."""
        return self.sampling_rate if self.output_sampling_rate is None else self.output_sampling_rate

    @property
    def output_ratio(self) -> int:
        """Samples at the decoder's rate for one at the encoder's."""
        return self.stored_rate // self.sampling_rate


@dataclass(frozen=True)
class SampleRef:
    """One position of the stream: a part of a clip and its random numbers. A worker needs nothing else."""

    position: int
    domain: str
    location: ClipLocation
    start: int  # first sample used
    num_samples: int  # samples used, per channel
    with_text: bool
    quantizer_uniform: float  # in [0, 1), like the next two: selects how many quantizers are used
    crop_uniform: float  # selects where the discriminators' crop starts
    gain_uniform: float = 0.5  # selects the gain within `ClipFormat.gain_db`


@dataclass(frozen=True)
class UpdatePlan:
    """What one rank reads for one generator update."""

    micro_batches: tuple[tuple[SampleRef, ...], ...]
    next_position: int  # position of the stream after this update, the same on every rank


class AudioStream:
    """Clips of packed folders, mixed by domain, in an order that depends on the seed and the position alone.

    A clip whose text is used is used whole. All others are cropped to `crop_seconds`, if they are longer: clips without
    text, clips longer than `max_seconds`, and every clip when `uses_text` is false because there is no text LM.
    `weights` are shares of audio seconds per domain; None uses the available seconds. A micro-batch may be split when
    less than `min_length_ratio` of its padded length is audio (see `split_by_length`).
    """

    def __init__(
        self,
        sources: Sequence[str | Path] | Corpus,
        clip_format: ClipFormat,
        *,
        crop_seconds: float,
        max_seconds: float = 30.0,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        window_shards: int = 8,
        min_length_ratio: float = 0.7,
        uses_text: bool = True,
    ) -> None:
        self.clip_format = clip_format
        self.seed = seed
        self.min_length_ratio = min_length_ratio
        self.uses_text = uses_text
        rate = clip_format.stored_rate
        self._crop_length, self._max_length = round(crop_seconds * rate), round(max_seconds * rate)
        if not isinstance(sources, Corpus):
            sources = Corpus.load(sources, sampling_rate=rate, num_channels=clip_format.num_channels)
        self._corpus = sources
        ranges = self._corpus.shard_ranges()
        self.domains = tuple(ranges)
        self._orders = [DomainOrder(name, ranges[name], seed=seed, window_shards=window_shards) for name in ranges]
        self.available_seconds: dict[str, float] = {}  # by domain
        self.num_with_text = 0  # clips whose text is used
        longest, mean_seconds = 0, []
        for order in self._orders:
            used_samples = samples = 0
            for lengths, has_text in self._corpus.iter_chunks(order.domain):
                used, with_text = self._used(lengths, has_text)
                self.num_with_text += int(with_text.sum())
                used_samples += int(used.sum())
                samples += int(lengths.sum())
                longest = max(longest, int(used.max()))
            mean_seconds.append(used_samples / order.num_clips / rate)
            self.available_seconds[order.domain] = samples / rate
        self.longest_seconds = longest / rate  # longest part that is used of any clip
        shares = domain_shares(self.domains, mean_seconds, list(self.available_seconds.values()), weights)
        self._mixture = DomainMixture(shares, seed)
        self.block_size = self._mixture.block_size
        self.block = lru_cache(maxsize=4)(self._make_block)

    @property
    def num_clips(self) -> dict[str, int]:
        """Clips per domain: one pass over the data."""
        return {order.domain: order.num_clips for order in self._orders}

    def plan_update(
        self, position: int, batch_seconds: float, micro_batch_seconds: float, rank: int = 0, world_size: int = 1
    ) -> UpdatePlan:
        """Plan one update of one rank: its micro-batches, and the stream's position afterwards.

        Consecutive clips are taken until their used audio reaches `batch_seconds`. They are assigned to the ranks by
        length, so that all ranks get about the same number of seconds. The clips of a rank are split evenly into few
        micro-batches, each with a padded length (count times longest) of at most `micro_batch_seconds`. Which clips an
        update has depends neither on the number of ranks nor on `micro_batch_seconds`. With fewer clips than ranks,
        some ranks have no micro-batches.
        """
        rate = self.clip_format.stored_rate
        parts: list[np.ndarray] = []
        total, samples, next_position = round(batch_seconds * rate), 0, position
        while samples < total or not parts:
            number, place = divmod(next_position, self.block_size)
            used = self.block(number)["num_samples"][place:]
            sums = samples + np.cumsum(used)
            parts.append(used[: int(np.searchsorted(sums, total)) + 1])
            next_position += len(parts[-1])
            samples = int(sums[len(parts[-1]) - 1])
        lengths = np.concatenate(parts)
        rank_indices = assign_to_rank(lengths, rank, world_size)
        groups = split_by_length(lengths[rank_indices], round(micro_batch_seconds * rate), self.min_length_ratio)
        refs = tuple(tuple(self.sample(position + int(rank_indices[i])) for i in group) for group in groups)
        return UpdatePlan(refs, next_position)

    def sample(self, position: int) -> SampleRef:
        """Return the sample at one position."""
        number, place = divmod(position, self.block_size)
        values = {name: array[place].item() for name, array in self.block(number).items()}
        domain, location = self.domains[values.pop("domain")], self._corpus.locate(values.pop("row"))
        return SampleRef(position, domain, location, **values)

    def _make_block(self, number: int) -> dict[str, np.ndarray]:
        """Return the samples of one block: `block_size` positions from `number * block_size` on.

        The result has an array [positions] for each field of `SampleRef`. Instead of names, `domain` holds indices into
        `domains`; instead of locations, `row` holds rows of the corpus.
        """
        domains, firsts, counts = self._mixture.block(number)
        rows = np.empty(len(domains), np.int64)
        for label, (order, first, count) in enumerate(zip(self._orders, firsts, counts, strict=True)):
            rows[domains == label] = order.rows(first, count)
        whole = self._corpus.column("num_samples", rows)
        lengths, with_text = self._used(whole, self._corpus.column("has_text", rows))
        room = whole - lengths + 1
        uniform = {
            purpose: uniforms(self.seed, purpose, number, count=len(rows))
            for purpose in ("start", "quantizer", "crop", "gain")
        }
        start = (uniform.pop("start") * room).astype(np.int64)
        block = {"domain": domains, "row": rows, "start": start, "num_samples": lengths, "with_text": with_text}
        return block | {f"{purpose}_uniform": numbers for purpose, numbers in uniform.items()}

    def _used(self, lengths: np.ndarray, has_text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the used lengths of clips, and whether their texts are used."""
        with_text = has_text & (lengths <= self._max_length) & self.uses_text
        return np.where(with_text, lengths, np.minimum(lengths, self._crop_length)), with_text


def assign_to_rank(lengths: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Return the indices of one rank's clips, longest first.

    Clips, sorted by length, are dealt to the ranks in snake order: from the first rank to the last, then from the last
    to the first, and so on, so that no rank always gets the longer clip.
    """
    order = np.argsort(-lengths, kind="stable")
    turns = np.arange(len(order)) // world_size
    places = np.arange(len(order)) % world_size
    return order[np.where(turns % 2 == 0, places, world_size - 1 - places) == rank]


def split_by_length(lengths: np.ndarray, limit: int, min_ratio: float) -> list[range]:
    """Split lengths, longest first, into as few runs as possible, as even as possible.

    A run costs its padded length, count times longest, which is at most `limit`; a longer clip is alone. Every forward
    pass has a fixed overhead, however short its run is. So if less than `min_ratio` of the padded length is audio, one
    more run is made only if it saves more than half of `limit`.
    """
    if not len(lengths):
        return []
    runs = even_runs(lengths, len(runs_within(lengths, limit)), limit)
    while int(lengths.sum()) < min_ratio * padded_length(lengths, runs):
        more = even_runs(lengths, len(runs) + 1, limit)
        if 2 * (padded_length(lengths, runs) - padded_length(lengths, more)) <= limit:
            break
        runs = more
    return runs


def runs_within(lengths: np.ndarray, limit: int) -> list[range]:
    """Cut lengths, longest first, into the fewest runs whose count times longest is at most `limit`."""
    runs, first = [], 0
    while first < len(lengths):
        stop = min(len(lengths), first + max(1, limit // max(1, int(lengths[first]))))
        runs.append(range(first, stop))
        first = stop
    return runs


def even_runs(lengths: np.ndarray, number: int, limit: int) -> list[range]:
    """Cut lengths, longest first, into at most `number` runs, the costliest of which is as cheap as it can be."""
    cheapest = bisect_left(range(1, limit), True, key=lambda cost: len(runs_within(lengths, cost)) <= number)
    return runs_within(lengths, 1 + cheapest)


def padded_length(lengths: np.ndarray, runs: Sequence[range]) -> int:
    """Return the padded length of all runs: the sum over runs of count times longest."""
    return sum(len(run) * int(lengths[run.start]) for run in runs)
