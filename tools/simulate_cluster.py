"""Run the real data-order code for a whole cluster on one CPU, and check the properties that long runs rely on.

    python tools/simulate_cluster.py                        # 256 ranks x 8 workers, a million shards, 10^9 clips
    python tools/simulate_cluster.py --num-shards 2000 --num-ranks 32 --num-updates 20

The corpus is synthetic (`synthetic_corpus.py`); the code that orders it is the code that `fit` runs. Prints a table.
The exit status is 1 if a check fails.
"""

import argparse
import hashlib
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import Queue
from pathlib import Path

import numpy as np
from synthetic_corpus import DOMAINS, RATE, Domain, load_corpus, write_indexes

from moss_train.data.stream.corpus import Corpus, DomainOrder
from moss_train.data.stream.stream import AudioStream, ClipFormat, SampleRef, UpdatePlan

RANKS_PER_NODE = 8


def make_stream(corpus: Corpus, seed: int) -> AudioStream:
    """Return the stream of a corpus, with clip durations measured and domains mixed."""
    weights = {domain.name: domain.weight for domain in DOMAINS}
    return AudioStream(corpus, ClipFormat(RATE, 1, 1920), crop_seconds=11.7, weights=weights, seed=seed)


def measure_start(folders: Sequence[tuple[Path, Domain]], options: argparse.Namespace, answers: Queue) -> None:
    """Do in a separate process what every rank does before its first batch, and put times and memory into `answers`."""
    before, begin = resident_megabytes(), time.process_time()
    stream = make_stream(load_corpus(folders), options.seed)
    started = time.process_time()
    plan_of(stream, 10**9, 0, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answers.put(
        StartReport(
            start_seconds=started - begin,
            resume_seconds=time.process_time() - started,
            megabytes=resident_megabytes() - before,
            peak_megabytes=peak - before,
        )
    )


def resident_megabytes() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@dataclass(frozen=True)
class StartReport:
    """Time and memory that one rank needs to start."""

    start_seconds: float  # CPU time until the stream is ready
    resume_seconds: float  # CPU time of the first plan after that, at position 10^9
    megabytes: float  # memory still in use at the end
    peak_megabytes: float  # largest memory in use meanwhile


@dataclass(frozen=True)
class Spread:
    """Minimum and maximum of a quantity over ranks and updates."""

    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the minimum and maximum of some values."""
        values = list(values)
        return cls(min(values), max(values))

    def __str__(self) -> str:
        return f"{self.least:,.4g}" if self.least == self.most else f"{self.least:,.4g} to {self.most:,.4g}"


@dataclass(frozen=True)
class RankReport:
    """What the ranks received in the simulated updates."""

    batches: Spread  # per rank
    clips: Spread  # per rank and update
    seconds: Spread  # per rank and update
    micro_batches: Spread  # per rank and update
    shards_per_worker: Spread  # different shards that one worker of one rank reads from in all its updates
    shards_per_node: Spread  # different shards that the ranks of one node read from in one update
    complete: bool  # together the ranks read every position exactly once
    plan_milliseconds: float  # median CPU time of planning one update of one rank


def plan_everything(stream: AudioStream, options: argparse.Namespace) -> list[list[UpdatePlan]]:
    """Return the plans of `--num-updates` updates, [update][rank]."""
    updates, position = [], options.position
    for _ in range(options.num_updates):
        updates.append([plan_of(stream, position, rank, options) for rank in range(options.num_ranks)])
        position = updates[-1][0].next_position
    return updates


def report_ranks(updates: Sequence[Sequence[UpdatePlan]], options: argparse.Namespace, seconds: float) -> RankReport:
    """Summarize the plans; computing them took `seconds`."""
    plans = [plan for ranks in updates for plan in ranks]
    opened: dict[tuple[int, int], set[str]] = {}
    for update, ranks in enumerate(updates):
        for rank, plan in enumerate(ranks):
            opened.setdefault((rank, update % options.num_workers), set()).update(shards_of([plan]))
    nodes = [ranks[i : i + RANKS_PER_NODE] for ranks in updates for i in range(0, len(ranks), RANKS_PER_NODE)]
    starts = [options.position, *(ranks[0].next_position for ranks in updates)]
    return RankReport(
        batches=Spread.of(sum(len(ranks) > rank for ranks in updates) for rank in range(options.num_ranks)),
        clips=Spread.of(len(refs_of(plan)) for plan in plans),
        seconds=Spread.of(sum(ref.num_samples for ref in refs_of(plan)) / RATE for plan in plans),
        micro_batches=Spread.of(len(plan.micro_batches) for plan in plans),
        shards_per_worker=Spread.of(len(shards) for shards in opened.values()),
        shards_per_node=Spread.of(len(shards_of(node)) for node in nodes),
        complete=all(is_complete(ranks, start) for ranks, start in zip(updates, starts, strict=False)),
        plan_milliseconds=1000 * seconds / len(plans),
    )


def plan_of(stream: AudioStream, position: int, rank: int, options: argparse.Namespace) -> UpdatePlan:
    """Return one rank's plan of the update that starts at a position."""
    return stream.plan_update(position, options.batch_seconds, options.micro_batch_seconds, rank, options.num_ranks)


def refs_of(plan: UpdatePlan) -> list[SampleRef]:
    """Return all samples of a plan."""
    return [ref for group in plan.micro_batches for ref in group]


def shards_of(plans: Iterable[UpdatePlan]) -> set[str]:
    """Return all shards that the plans read from."""
    return {ref.location.shard for plan in plans for ref in refs_of(plan)}


def is_complete(plans: Sequence[UpdatePlan], position: int) -> bool:
    """Tell whether the ranks together read every position of the update once and agree on where it ends."""
    positions = sorted(ref.position for plan in plans for ref in refs_of(plan))
    return positions == list(range(position, plans[0].next_position)) and len({p.next_position for p in plans}) == 1


@dataclass(frozen=True)
class MixtureReport:
    """Composition of a long section of the stream."""

    shares: dict[str, float]  # share of the audio seconds by domain
    distinct: bool  # no clip occurred twice, in less than one pass over each source


def report_mixture(stream: AudioStream, num_positions: int) -> MixtureReport:
    """Summarize the first `num_positions` positions."""
    blocks = [stream.block(number) for number in range(-(-num_positions // stream.block_size))]
    domains, rows = (np.concatenate([block[name] for block in blocks]) for name in ("domain", "row"))
    seconds = np.bincount(domains, np.concatenate([block["num_samples"] for block in blocks]), len(stream.domains))
    shares = dict(zip(stream.domains, (seconds / seconds.sum()).tolist(), strict=True))
    counts = dict(zip(stream.domains, np.bincount(domains, minlength=len(stream.domains)).tolist(), strict=True))
    repeated = [domain for domain, count in counts.items() if count > stream.num_clips[domain]]
    if repeated:
        raise SystemExit(f"--num-positions={num_positions} is more than one pass of {repeated[0]}; give fewer")
    return MixtureReport(shares, len(np.unique(rows)) == len(rows))


def reads_each_once(corpus: Corpus, domain: str, seed: int) -> bool:
    """Tell whether the second pass over one source reads every one of its clips once."""
    shards = corpus.shard_ranges()[domain]
    order = DomainOrder(domain, shards, seed=seed, window_shards=8)
    seen = np.zeros(order.num_clips, np.int64)
    for begin in range(0, order.num_clips, 2**20):
        rows = order.rows(order.num_clips + begin, min(2**20, order.num_clips - begin))
        seen += np.bincount(rows - shards[0, 0], minlength=order.num_clips)
    return bool((seen == 1).all())


def digest(stream: AudioStream, position: int, num_ranks: int, options: argparse.Namespace) -> str:
    """Return a hash of all samples of two updates from a position, read by a number of ranks, in the stream's order."""
    state = hashlib.sha256()
    for _ in range(2):
        one = argparse.Namespace(**vars(options) | {"num_ranks": num_ranks})
        plans = [plan_of(stream, position, rank, one) for rank in range(num_ranks)]
        refs = sorted((ref for plan in plans for ref in refs_of(plan)), key=lambda ref: ref.position)
        state.update(repr(refs).encode())
        position = plans[0].next_position
    return state.hexdigest()


@dataclass(frozen=True)
class ClusterReport:
    """All results of the simulation."""

    num_clips: int
    hours: float
    start: StartReport
    ranks: RankReport
    mixture: MixtureReport
    whole_pass: bool
    same_after_resume: bool
    same_in_other_worlds: bool

    @property
    def largest_error(self) -> float:
        """Largest relative difference between a domain's share of the audio seconds and its weight."""
        return max(abs(self.mixture.shares[domain.name] / domain.weight - 1) for domain in DOMAINS)

    def checks(self) -> dict[str, bool]:
        """Return the checks by name, and whether each one passes."""
        return {
            "equal numbers of batches on every rank": self.ranks.batches.least == self.ranks.batches.most,
            "the ranks together read every position once": self.ranks.complete,
            f"shares of the domains within 1 % of their weights ({self.largest_error:.2%})": self.largest_error < 0.01,
            "no clip repeated within the simulated stretch": self.mixture.distinct,
            "every clip once in a whole pass of the smallest source": self.whole_pass,
            "the same samples after a resume at another update": self.same_after_resume,
            "the same samples in worlds of 1, 3 and 64 ranks": self.same_in_other_worlds,
        }


def simulate(options: argparse.Namespace) -> ClusterReport:
    """Write the indexes of a synthetic corpus and run the whole simulation on it."""
    with tempfile.TemporaryDirectory() as name:
        folders = write_indexes(Path(name), options.num_shards)
        start = in_own_process(measure_start, folders, options)
        corpus = load_corpus(folders)
    stream, resumed = make_stream(corpus, options.seed), make_stream(corpus, options.seed)
    begin = time.process_time()
    updates = plan_everything(stream, options)
    planning_seconds = time.process_time() - begin
    middle = updates[len(updates) // 2][0].next_position
    expected = digest(stream, middle, options.num_ranks, options)
    return ClusterReport(
        num_clips=len(corpus),
        hours=sum(stream.available_seconds.values()) / 3600,
        start=start,
        ranks=report_ranks(updates, options, planning_seconds),
        mixture=report_mixture(stream, options.num_positions),
        whole_pass=reads_each_once(corpus, min(stream.num_clips, key=stream.num_clips.__getitem__), options.seed),
        same_after_resume=digest(resumed, middle, options.num_ranks, options) == expected,
        same_in_other_worlds=all(digest(resumed, middle, world, options) == expected for world in (1, 3, 64)),
    )


def in_own_process(function: Callable[..., None], *arguments: object) -> StartReport:
    """Run a function in a fresh process and return its answer."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=function, args=(*arguments, answers))
    process.start()
    report = answers.get(timeout=3600)
    process.join()
    return report


def print_report(report: ClusterReport, options: argparse.Namespace) -> None:
    """Print the table."""
    start, ranks = report.start, report.ranks
    shares = ", ".join(
        f"{domain.name} {report.mixture.shares[domain.name]:.4f} of {domain.weight:.4f}" for domain in DOMAINS
    )
    rows = {
        "ranks x workers": f"{options.num_ranks} x {options.num_workers}",
        "shards, clips, hours": f"{options.num_shards:,}, {report.num_clips:,}, {report.hours:,.0f}",
        "start of one rank": f"{start.start_seconds:.1f} s of CPU time",
        "resume at position 10^9": f"{start.resume_seconds:.2f} s of CPU time",
        "memory of one rank": f"{start.megabytes:,.0f} MiB, {start.peak_megabytes:,.0f} MiB while starting",
        "batches per rank": f"{ranks.batches} (updates of {options.batch_seconds:,.0f} s)",
        "clips per rank and update": str(ranks.clips),
        "seconds per rank and update": str(ranks.seconds),
        "micro-batches per rank and update": f"{ranks.micro_batches} (of at most {options.micro_batch_seconds:,.0f} s)",
        "planning of one update": f"{ranks.plan_milliseconds:.1f} ms of CPU time",
        "shards read by one worker": str(ranks.shards_per_worker),
        f"shards read by {RANKS_PER_NODE} ranks in one update": str(ranks.shards_per_node),
        f"shares of {options.num_positions:,} samples": shares,
    }
    for name, value in rows.items():
        print(f"{name:<38} {value}")
    for name, passed in report.checks().items():
        print(f"{'yes' if passed else 'NO':<4} {name}")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-shards", type=int, default=1_000_000)
    parser.add_argument("--num-ranks", type=int, default=256)
    parser.add_argument("--num-workers", type=int, default=8, help="per rank")
    parser.add_argument("--num-updates", type=int, default=64, help="that are planned for every rank")
    parser.add_argument("--num-positions", type=int, default=2_000_000, help="samples that the shares are taken of")
    parser.add_argument("--position", type=int, default=123_456_789, help="of the stream, where the updates begin")
    parser.add_argument("--batch-seconds", type=float, default=18_000.0, help="audio of one update over all ranks")
    parser.add_argument("--micro-batch-seconds", type=float, default=90.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


def main() -> int:
    """Simulate, print the table, and return 0 if all checks pass and 1 otherwise."""
    options = arguments()
    report = simulate(options)
    print_report(report, options)
    return 0 if all(report.checks().values()) else 1


if __name__ == "__main__":
    sys.exit(main())
