"""Thousands of random joins, leaves, resets, flushes and chunk sizes: every stream equals its offline result."""

from functools import lru_cache

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor

from moss_train.model import MossAudioTokenizerModel

from ..model.small_models import num_real_differences, relative_error, small_model
from .harness import SCALE

pytestmark = pytest.mark.faults

BATCH_SIZE = 3
LONGEST_CHUNK = 30  # frames; the longest window lasts 8
TOLERANCE = 1e-5

items = st.lists(st.booleans(), min_size=BATCH_SIZE, max_size=BATCH_SIZE)
frame_counts = st.lists(st.integers(0, LONGEST_CHUNK), min_size=BATCH_SIZE, max_size=BATCH_SIZE)


@lru_cache
def model_with(channels: int) -> MossAudioTokenizerModel:
    return small_model(channels, number_channels=channels)


class Item:
    """The input of one stream since it began, and its output."""

    def __init__(self, model: MossAudioTokenizerModel) -> None:
        self.model = model
        self.samples = [torch.zeros(model.config.number_channels, 0)]
        self.codes = [torch.zeros(model.config.num_quantizers, 0, dtype=torch.int64)]
        self.audio = [torch.zeros(model.config.number_channels, 0)]

    def check(self, flushed: bool) -> None:
        """Compare with the result for the whole clip."""
        samples, codes, audio = (torch.cat(x, dim=1) for x in (self.samples, self.codes, self.audio))
        hop = self.model.config.downsample_rate
        frames = -(-samples.shape[1] // hop) if flushed else samples.shape[1] // hop
        assert codes.shape[1] == frames
        assert audio.shape[1] == frames * hop
        if frames:
            whole = self.model.encode(samples[None, :, : frames * hop])
            expected = whole.audio_codes[:, 0]
            assert num_real_differences(self.model, whole.encoder_hidden_states, codes[:, None], expected[:, None]) == 0
            assert relative_error(audio, self.model.decode(codes).audio[0]) < TOLERANCE


class Streams(RuleBasedStateMachine):
    """One stream object whose items receive data, are reset and are flushed in any order."""

    @initialize(channels=st.sampled_from((1, 2)), seed=st.integers(0, 2**31))
    def begin(self, channels: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.model = model_with(channels)
        self.stream = self.model.stream(BATCH_SIZE)
        self.items = [Item(self.model) for _ in range(BATCH_SIZE)]

    @rule(counts=frame_counts, odd=st.integers(0, 15))
    def feed(self, counts: list[int], odd: int) -> None:
        """Send any numbers of samples, whole frames or not."""
        hop = self.model.config.downsample_rate
        lengths = [max(0, count * hop - odd * (index % 2)) for index, count in enumerate(counts)]
        chunk = torch.randn(BATCH_SIZE, self.model.config.number_channels, max(lengths), generator=self.generator)
        for item, samples, length in zip(self.items, chunk, lengths, strict=True):
            item.samples.append(samples[:, :length])
        self._take(*self.stream.encode(chunk, torch.tensor(lengths)))

    @rule(frames=st.integers(1, LONGEST_CHUNK))
    def feed_all(self, frames: int) -> None:
        """Send the same number of whole frames to every item."""
        samples = frames * self.model.config.downsample_rate
        chunk = torch.randn(BATCH_SIZE, self.model.config.number_channels, samples, generator=self.generator)
        for item, own in zip(self.items, chunk, strict=True):
            item.samples.append(own)
        self._take(*self.stream.encode(chunk))

    @rule(leaving=items)
    def reset(self, leaving: list[bool]) -> None:
        self.stream.reset(torch.tensor(leaving))
        for index in (index for index, leaves in enumerate(leaving) if leaves):
            self.items[index].check(flushed=False)
            self.items[index] = Item(self.model)

    @rule()
    def flush(self) -> None:
        """End all streams, with their incomplete frames."""
        self._take(*self.stream.flush())
        self.stream.reset()
        for item in self.items:
            item.check(flushed=True)
        self.items = [Item(self.model) for _ in self.items]

    def _take(self, codes: Tensor, lengths: Tensor) -> None:
        audio, samples = self.stream.decode(codes, lengths)
        for index, item in enumerate(self.items):
            item.codes.append(codes[:, index, : lengths[index]])
            item.audio.append(audio[index, :, : samples[index]])

    def teardown(self) -> None:
        for item in getattr(self, "items", ()):
            item.check(flushed=False)


class Rows(RuleBasedStateMachine):
    """`batch_decode(..., streaming=True)` with rows that are added at the end and removed anywhere."""

    @initialize(channels=st.sampled_from((1, 2)), seed=st.integers(0, 2**31))
    def begin(self, channels: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.model = model_with(channels)
        self.rows: list[tuple[list[Tensor], list[Tensor]]] = []
        self.begins = True

    @precondition(lambda self: self.rows)
    @rule()
    def drop_all(self) -> None:
        """Let the next call start again with `reset_stream`."""
        for row in self.rows:
            self._check(row)
        self.rows, self.begins = [], True

    @rule(joining=st.integers(0, BATCH_SIZE), frames=frame_counts, leaving=items)
    def decode(self, joining: int, frames: list[int], leaving: list[bool]) -> None:
        active = min(BATCH_SIZE, len(self.rows) + joining)
        if not active:
            return
        self.rows += [([], []) for _ in range(active - len(self.rows))]
        size = self.model.config.quantizer_kwargs["codebook_size"]
        levels = self.model.config.num_quantizers
        codes = [torch.randint(0, size, (levels, count), generator=self.generator) for count in frames[:active]]
        ending = [row for row in range(active) if leaving[row]]
        output = self.model.batch_decode(
            codes, streaming=True, max_batch_size=BATCH_SIZE, reset_stream=self.begins, finalize_indices=ending
        )
        self.begins = False
        for row, (given, heard) in enumerate(self.rows):
            given.append(codes[row])
            heard.append(output.audio[row, :, : output.audio_lengths[row]])
        for row in ending:
            self._check(self.rows[row])
        self.rows = [row for index, row in enumerate(self.rows) if index not in ending]

    def _check(self, row: tuple[list[Tensor], list[Tensor]]) -> None:
        codes, audio = (torch.cat(parts, dim=1) for parts in row)
        assert audio.shape[1] == codes.shape[1] * self.model.config.downsample_rate
        if codes.shape[1]:
            assert relative_error(audio, self.model.decode(codes).audio[0]) < TOLERANCE

    def teardown(self) -> None:
        for row in getattr(self, "rows", ()):
            self._check(row)


many = settings(
    max_examples=8 * SCALE,
    stateful_step_count=50,
    deadline=None,
    derandomize=SCALE == 1,
    phases=[Phase.generate],
)  # a failing sequence is readable without an hour of shrinking
TestStreams = Streams.TestCase
TestStreams.settings = many
TestRows = Rows.TestCase
TestRows.settings = many
