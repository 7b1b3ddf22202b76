"""Pack clips into shards: a FLAC and a JSON per clip, a domain per shard, the same bytes for the same input.

Worker processes read and encode; this process writes, in the order of the list. A shard ends with the clip that brings
it to its size, so its content depends neither on the number of processes nor on where an earlier attempt was killed.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_train.audio.io import RESAMPLER
from moss_train.config.schema import PackConfig
from moss_train.data.pack.manifest import SourceList
from moss_train.data.pack.preprocess import SkippedClip, preprocess_clip, preprocess_segment
from moss_train.data.pack.resume import (
    FinishedShard,
    ShardInputs,
    resumable_directory,
    reuse_finished_shards,
    write_journal,
)
from moss_train.data.shards.format import FORMAT_VERSION, EncodedClip, ShardWriter, read_shard
from moss_train.data.shards.index import INDEX_FILE, IndexBuilder
from moss_train.utils.errors import Fault, InvalidSample, UserError, count_faults
from moss_train.utils.workers import num_cores, ray_pool, worker_pool

CLIPS_PER_PROCESS = 200
"""One process is started per this many clips if the number of processes is not given."""

Outcome = EncodedClip | SkippedClip


class NothingToPackError(UserError):
    """No clip of the input can be used, or all are left out."""


@dataclass(frozen=True)
class PackReport:
    """What was packed and what was not."""

    index: dict  # content of index.json
    skipped: dict[str, int]  # clips by kind: too short, too long, silent, dropped
    invalid: tuple[InvalidSample, ...]  # unreadable files and lines that are not clips
    ignored: dict[str, int]  # suffixes or manifest keys without effect
    num_resumed: int  # shards that an earlier attempt had finished
    remarks: dict[str, int]  # number of packed clips by remark about them


def pack(
    sources: SourceList,
    options: PackConfig,
    *,
    drop: frozenset[str] = frozenset(),
    on_clip: Callable[[float], None] = lambda seconds: None,
) -> PackReport:
    """Pack every clip of a list into a new folder of shards with an index, `options.out`.

    `on_clip` is called with the seconds of every clip, 0 if it was skipped. `drop` has the ids of clips, or of parts of
    long ones, to leave out. The folder appears under its name only once it is complete; shards that were finished
    before an error or a kill are reused by the next call. Raises UserError, naming the file or line, for input that
    cannot be packed.
    """
    target = Path(options.out)
    check_target(target, options.overwrite)
    if options.executor == "ray":
        pool = ray_pool(options.num_workers)
    else:
        count = options.num_workers or min(num_cores(), 1 + len(sources.clips) // CLIPS_PER_PROCESS)
        pool = worker_pool(count if count > 1 else 0, "moss_train.data.pack.preprocess")
    with resumable_directory(target) as folder, pool as map_ordered:
        packer = _Packer(folder, sources, options, drop)
        todo, num_resumed = packer.resume()
        for _ in range(len(sources.clips) - len(todo)):
            on_clip(0.0)
        clips = (sources.clips[number] for number in todo if sources.clips[number].id not in drop)
        results = map_ordered(preprocess_clip, clips, options)
        try:
            for number in todo:
                clip = sources.clips[number]
                result = SkippedClip("dropped") if clip.id in drop else next(results)[1]
                outcomes: Iterable[Outcome]
                if isinstance(result, tuple):
                    outcomes = (outcome for _, outcome in map_ordered(preprocess_segment, result, clip, options))
                else:
                    outcomes = [result]
                on_clip(packer.add(number, outcomes))
            index = packer.finish()
        finally:
            packer.discard()
        return PackReport(
            index, dict(packer.skipped), tuple(packer.invalid), sources.ignored, num_resumed, dict(packer.remarks)
        )


class _Packer:
    """Sorts clips into one open shard per domain, and indexes and records every shard as it is closed."""

    def __init__(self, folder: Path, sources: SourceList, options: PackConfig, drop: frozenset[str]) -> None:
        self.invalid: list[InvalidSample] = [bad for bad in sources.invalid if bad.name not in drop]
        self.skipped: Counter[str] = +Counter(dropped=len(sources.invalid) - len(self.invalid))
        self.remarks: Counter[str] = Counter()
        self._folder, self._sources, self._options, self._drop = folder, sources, options, drop
        self._settings = content_settings(options) | {"drop": sorted(drop)}
        self._open: dict[str, ShardWriter] = {}
        self._inputs: dict[str, ShardInputs] = {}
        self._num_shards: Counter[str] = Counter()
        self._index = IndexBuilder(options.sampling_rate, options.num_channels)

    def resume(self) -> tuple[list[int], int]:
        """Reuse finished shards; return the numbers of the clips still to do and the number of reused shards."""
        kept = reuse_finished_shards(self._folder, self._sources.clips, self._settings, self._options.sampling_rate)
        done: dict[str, int] = {}
        for shard, contents in kept:
            self._index.add(shard.file, shard.domain, contents)
            self._num_shards[shard.domain] += 1
            self.skipped.update(shard.left_out)
            self.invalid += [InvalidSample(name, reason, Fault(fault)) for name, reason, fault in shard.bad]
            self.remarks.update(shard.remarks)
            done[shard.domain] = shard.last
        self._check_share()
        clips = enumerate(self._sources.clips)
        return [number for number, clip in clips if number > done.get(clip.domain, -1)], len(kept)

    def add(self, number: int, outcomes: Iterable[Outcome]) -> float:
        """Store the outcome of a clip, or of each of its parts, and return the seconds stored, 0 if all is skipped."""
        clip = self._sources.clips[number]
        if clip.domain not in self._inputs:
            self._inputs[clip.domain] = ShardInputs(self._settings)
        inputs = self._inputs[clip.domain]
        inputs.add(number, clip)
        num_samples = 0
        for part, outcome in enumerate(outcomes):
            if isinstance(outcome, SkippedClip) and outcome.kind == "unreadable":
                self.invalid.append(InvalidSample(clip.id, outcome.reason, outcome.fault))
                inputs.bad.append([clip.id, outcome.reason, str(outcome.fault)])
                self._check_share()
                continue
            if isinstance(outcome, SkippedClip) or outcome.id in self._drop:
                kind = outcome.kind if isinstance(outcome, SkippedClip) else "dropped"
                self.skipped[kind] += 1
                inputs.left_out[kind] += 1
                continue
            if clip.domain not in self._open:
                path = self._folder / f"{clip.domain}-{self._num_shards[clip.domain]:06d}.tar"
                self._open[clip.domain] = ShardWriter(path, self._options.sampling_rate)
                self._num_shards[clip.domain] += 1
            key = f"{number:09d}" if outcome.id == clip.id else f"{number:09d}-{part:06d}"
            self._open[clip.domain].write(key, outcome, clip.labels())
            num_samples += outcome.num_samples
            self.remarks.update(outcome.remarks)
            inputs.remarks.update(outcome.remarks)
        if clip.domain in self._open and self._open[clip.domain].num_bytes >= self._options.shard_bytes:
            self._close(clip.domain)
        return num_samples / self._options.sampling_rate

    def finish(self) -> dict:
        """Close the last shards, write the index and return its content."""
        for domain in list(self._open):
            self._close(domain)
        if not self._num_shards:
            minimum = f"min_seconds={self._options.min_seconds}"
            others = "".join(f", {count} {kind}" for kind, count in self.skipped.items() if kind != "too short")
            raise NothingToPackError(
                f"{self._sources.key}={self._sources.source}: nothing to pack, {self.skipped['too short']} clips are "
                f"shorter than {minimum}{others} and {len(self.invalid)} could not be read"
            )
        return self._index.write(self._folder)

    def discard(self) -> None:
        """Close shards that are still open after an error, without finishing them."""
        while self._open:
            self._open.popitem()[1].discard()

    def _check_share(self) -> None:
        """Raise UserError when too many files and lines are bad."""
        share, total = self._options.max_invalid_fraction, self._sources.total
        if len(self.invalid) <= share * total:
            return
        if share == 0:
            raise UserError(
                f"{self.invalid[0].reason}; repair or remove it, or leave such clips out with max_invalid_fraction=0.01"
            )
        raise UserError(
            f"{len(self.invalid)} of {total} clips cannot be used ({count_faults(self.invalid)}), more than "
            f"max_invalid_fraction={share} allows; the last: {self.invalid[-1].reason}"
        )

    def _close(self, domain: str) -> None:
        writer, inputs = self._open.pop(domain), self._inputs.pop(domain)
        writer.close()
        contents = read_shard(writer.path, self._options.sampling_rate)
        if len(contents.labels) != writer.num_clips:
            raise OSError(f"{writer.path}: {len(contents.labels)} of {writer.num_clips} clips came back after writing")
        self._index.add(writer.path.name, domain, contents)
        name, sha256 = writer.path.name, contents.sha256
        lost = (dict(inputs.left_out), inputs.bad, dict(inputs.remarks))
        shard = FinishedShard(name, domain, inputs.last, inputs.digest.hexdigest(), sha256, *lost)
        write_journal(self._folder, [shard])


def content_settings(options: PackConfig) -> dict[str, Any]:
    """Return the settings that, together with the clips, determine the content of a shard."""
    others = ("input", "out", "domain", "drop", "max_invalid_fraction", "num_workers", "executor", "overwrite")
    settings = {name: value for name, value in options.to_plain().items() if name not in others}
    return settings | {"resampler": RESAMPLER, "format": FORMAT_VERSION}


def check_target(target: Path, overwrite: bool | None) -> None:
    """Raise UserError unless the target is missing, an empty folder or, with `overwrite`, an earlier result.

    `overwrite` is None for a command that has no such option.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise UserError(f"out={target} exists and is not a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        advice = "" if overwrite is None else " or overwrite=true"
        raise UserError(f"out={target} exists and is not empty; give another folder{advice}")
    if not (target / INDEX_FILE).is_file():
        raise UserError(f"out={target} is not a folder of packed shards; overwrite=true does not replace it")
