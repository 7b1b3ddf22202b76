"""Means over clips with bootstrap confidence intervals, as tables and plots show them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moss_train.evaluation.metrics.base import Column
from moss_train.evaluation.reconstruct import Condition
from moss_train.evaluation.results import ClipRow, ConditionRow

ALL_DOMAINS = "all"
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class ConfidenceInterval:
    """A mean over clips, or a quotient of sums, with a 95 % bootstrap interval over clips."""

    mean: float
    low: float
    high: float
    num_clips: int


@dataclass(frozen=True)
class SummaryRow:
    """One row of the table."""

    domain: str
    condition: Condition
    estimates: dict[str, ConfidenceInterval]  # by key of the column; without columns that have no value
    num_clips: int
    num_failed: int  # clips with at least one missing value


def summarize(
    rows: Sequence[ClipRow],
    conditions: Sequence[Condition],
    columns: Sequence[Column],
    policy: str = "exclude",
    seed: int = 0,
) -> list[SummaryRow]:
    """Return one row per domain and condition, domains in alphabetical order.

    If there are several domains, rows for all of them together follow. Each clip counts once, whatever its length. The
    order of `rows` changes nothing.
    """
    ordered = sorted(rows, key=lambda row: (row.clip, row.key))
    domains = sorted({row.domain for row in ordered})
    groups = {domain: [row for row in ordered if row.domain == domain] for domain in domains}
    if len(domains) > 1:
        groups[ALL_DOMAINS] = ordered
    table = []
    for (domain, members), condition in itertools.product(groups.items(), conditions):
        entries = [entry for row in members if (entry := _entry(row, condition)) is not None]
        values = [entry.official | entry.values if policy == "official" else entry.values for entry in entries]
        estimates = {}
        for column in columns:
            pairs = [pair for value in values if (pair := _numerator_and_denominator(value, column)) is not None]
            if sum(below for _, below in pairs) > 0:
                estimates[column.key] = bootstrap(np.array(pairs), seed)
        if entries:
            failed = sum(bool(entry.errors or entry.failure) for entry in entries)
            table.append(SummaryRow(domain, condition, estimates, len(entries), failed))
    return table


def mean_scores(
    rows: Sequence[ClipRow], conditions: Sequence[Condition], columns: Sequence[Column]
) -> dict[str, float]:
    """Return means by `domain/key/levels`, such as `speech/stoi/8`; the domain `all` is always among them."""
    table = summarize(rows, conditions, columns)
    is_one_domain = len({row.domain for row in table}) == 1
    return {
        f"{domain}/{key}/{row.condition.num_quantizers}": estimate.mean
        for row in table
        for domain in ((ALL_DOMAINS, row.domain) if is_one_domain else (row.domain,))
        for key, estimate in row.estimates.items()
    }


def _entry(row: ClipRow, condition: Condition) -> ConditionRow | None:
    if row.failure is not None:
        return ConditionRow(condition, failure=row.failure)
    return next((entry for entry in row.conditions if entry.condition == condition), None)


def _numerator_and_denominator(values: Mapping[str, float], column: Column) -> tuple[float, float] | None:
    if column.key not in values:
        return None
    return values[column.key], 1.0 if column.denominator is None else values[column.denominator]


def bootstrap(sums: np.ndarray, seed: int) -> ConfidenceInterval:
    """Return the quotient of two sums over clips with the percentile interval of 1000 resamples of the clips.

    With ones in the second column it is a mean. Draws depend on the seed and the number of clips only, so two columns
    over the same clips are resampled alike.

    Args:
        sums: [clips, 2] numerators and denominators, or [clips, 4]: the quotient of the last two is subtracted.
    """
    count = len(sums)
    generator = np.random.default_rng([seed, count])
    totals = np.empty((NUM_RESAMPLES, sums.shape[1]))
    for index in range(NUM_RESAMPLES):
        totals[index] = sums[generator.integers(count, size=count)].sum(0)
    totals = np.concatenate((sums.sum(0, keepdims=True), totals[(totals[:, 1::2] > 0).all(1)]))
    quotients = totals[:, ::2] / totals[:, 1::2]
    values = quotients[:, 0] - quotients[:, 1:].sum(1)
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return ConfidenceInterval(float(values[0]), float(low), float(high), count)


def paired_difference(
    rows: Sequence[ClipRow], others: Sequence[ClipRow], conditions: tuple[Condition, Condition], column: Column
) -> ConfidenceInterval | None:
    """Return first minus second over the clips with both values, with its interval; None if there are none.

    It is the difference of the values that a table of these clips shows: of means, or of quotients of sums.

    conditions: of the first and of the second rows.
    """
    first: dict[str, tuple[float, float]] = {}
    second: dict[str, tuple[float, float]] = {}
    for pairs, part, condition in ((first, rows, conditions[0]), (second, others, conditions[1])):
        for row in part:
            entry = _entry(row, condition)
            pair = _numerator_and_denominator(entry.values, column) if entry is not None else None
            if pair is not None:
                pairs[row.clip] = pair
    sums = np.array([first[clip] + second[clip] for clip in sorted(first.keys() & second.keys())])
    if not len(sums) or not (sums[:, 1::2].sum(0) > 0).all():
        return None
    return bootstrap(sums, seed=0)
