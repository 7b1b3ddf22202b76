"""Count what the training stream delivered: hours by domain, and invalid clips by kind."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from moss_train.batch import UpdateBatch
from moss_train.utils.errors import Fault, UserError

MIN_SAMPLES = 1000
"""The share of bad samples is taken of at least so many, so that the first bad one does not end a run."""

RECENT_UPDATES = 20
RECENT_BAD_SHARE = 0.5
"""Of the samples of so many updates in a row at most this share may be bad, or `max_invalid_fraction` if that is more:
late in a run its share of all samples would let it go on without data for days."""


class StreamCounter:
    """Counts what a run has used and lost. `max_invalid_fraction` is the share of samples that may be lost."""

    def __init__(self, sampling_rate: int, *, max_invalid_fraction: float = 0.01) -> None:
        if not 0 <= max_invalid_fraction <= 1:
            raise UserError(f"max_invalid_fraction={max_invalid_fraction} has to be between 0 and 1")
        self._sampling_rate = sampling_rate
        self._max_invalid_fraction = max_invalid_fraction
        self._samples: Counter[str] = Counter()  # audio samples by domain
        self._kinds: Counter[str] = Counter()
        self._num_clips = 0
        self.num_without_text = 0  # samples so far whose text was too long
        self._named: set[str] = set()
        self._last_line = ""
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT_UPDATES)  # used and bad samples of an update

    @property
    def hours(self) -> dict[str, float]:
        """Hours of audio used so far, by domain."""
        return {domain: count / self._sampling_rate / 3600 for domain, count in sorted(self._samples.items())}

    @property
    def bad(self) -> dict[str, int]:
        """Samples lost so far, by kind."""
        return dict(sorted(self._kinds.items()))

    def add(self, batch: UpdateBatch) -> list[str]:
        """Count one update of the only rank: `describe_dropped` and `add_counts` in one."""
        lines = self.describe_dropped(batch)
        self.add_counts(self.counts(batch, {name for micro in batch.micro_batches for name in micro.domains}))
        return lines

    def describe_dropped(self, batch: UpdateBatch) -> list[str]:
        """Return a line for every bad sample of this rank that has not been named before."""
        lines = []
        for bad in batch.dropped:
            if bad.name not in self._named:
                self._named.add(bad.name)
                lines.append(f"left out {bad.name}: {bad.reason}")
        self._last_line = lines[-1] if lines else ""
        for sample_id in batch.without_text:
            if sample_id not in self._named:
                self._named.add(sample_id)
                lines.append(f"used {sample_id} without its text, which has more than data.max_text_tokens")
        return lines

    def counts(self, batch: UpdateBatch, domains: Iterable[str]) -> dict[str, float]:
        """Numbers of one update by name, which may be summed over ranks: the same names for the same domains."""
        counts = {f"samples/{domain}": 0.0 for domain in sorted(domains)}
        counts |= {f"bad/{fault}": 0.0 for fault in Fault} | {"used_clips": 0.0}
        counts["without_text"] = float(len(batch.without_text))
        for micro_batch in batch.micro_batches:
            counts["used_clips"] += micro_batch.num_clips
            lengths = (micro_batch.host or micro_batch).audio_lengths.tolist()  # on a device it would wait for it
            for domain, length in zip(micro_batch.domains, lengths, strict=True):
                counts[f"samples/{domain}"] += length
        for bad in batch.dropped:
            counts[f"bad/{bad.fault}"] += 1
        return counts

    def add_counts(self, counts: Mapping[str, float]) -> None:
        """Add the numbers of one update, summed over ranks; other names than those of `counts` are left alone.

        Raises UserError when too large a share of all samples or of the recent ones was lost, with the kinds and the
        last reason.
        """
        used = int(counts["used_clips"])
        self._num_clips += used
        self.num_without_text += int(counts.get("without_text", 0))
        self._recent.append((used, int(sum(value for name, value in counts.items() if name.startswith("bad/")))))
        for name, value in counts.items():
            group, _, key = name.partition("/")
            if value and group in ("samples", "bad"):
                (self._samples if group == "samples" else self._kinds)[key] += int(value)
        self._check_recent()
        self._check_share(self._last_line)

    def _check_recent(self) -> None:
        used, bad = (sum(column) for column in zip(*self._recent, strict=True))
        if len(self._recent) == RECENT_UPDATES and bad > max(RECENT_BAD_SHARE, self._max_invalid_fraction) * (
            used + bad
        ):
            raise UserError(
                f"{bad} of the {used + bad} samples of the last {RECENT_UPDATES} updates could not be used: is the "
                f"data still in reach? The same command goes on from the newest checkpoint. {self._last_line}".rstrip()
            )

    def _check_share(self, last: str) -> None:
        num_bad = sum(self._kinds.values())
        num_samples = self._num_clips + num_bad
        if num_bad <= self._max_invalid_fraction * max(num_samples, MIN_SAMPLES):
            return
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common())
        raise UserError(
            f"{num_bad} of {num_samples} samples could not be used ({kinds}), more than max_invalid_fraction="
            f"{self._max_invalid_fraction} allows; find them with `moss_train inspect`. {last}".rstrip()
        )

    def state_dict(self) -> dict[str, Any]:
        """Counts as plain data, for a checkpoint."""
        return {
            "samples": dict(self._samples),
            "kinds": dict(self._kinds),
            "num_clips": self._num_clips,
            "num_without_text": self.num_without_text,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from an earlier `state_dict`."""
        self._samples, self._kinds = Counter(state["samples"]), Counter(state["kinds"])
        self._num_clips = state["num_clips"]
        self.num_without_text = state.get("num_without_text", 0)  # older runs left no text out
