"""Means, intervals, codebook statistics and tables."""

import csv
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from moss_train.evaluation.metrics.base import Column
from moss_train.evaluation.metrics.codes import codebook_usage, count_codes, effective_bitrate
from moss_train.evaluation.reconstruct import Condition
from moss_train.evaluation.report.html import bitrate_plot
from moss_train.evaluation.report.tables import Difference, Table, codebook_csv, comma_separated, markdown
from moss_train.evaluation.results import ClipRow, ConditionRow
from moss_train.evaluation.statistics import bootstrap, paired_difference, summarize

DEEP, SHALLOW = Condition("x", 8, 800.0), Condition("x", 1, 100.0)
SCORE = Column("score", "Score", True)
RATE = Column("errors", "WER", False, denominator="words")


def row(clip: str, domain: str = "speech", failure: str | None = None, **values: float) -> ClipRow:
    entry = ConditionRow(DEEP, dict(values))
    return ClipRow(clip, domain, clip, 1.0, (entry,), failure)


def test_the_mean_counts_every_clip_once_and_leaves_failures_out():
    rows = [row("a", score=1.0), row("b", score=3.0), row("c", failure="cannot read c")]
    (line,) = summarize(rows, [DEEP], [SCORE])
    assert line.estimates["score"].mean == 2.0
    assert (line.estimates["score"].num_clips, line.num_clips, line.num_failed) == (2, 3, 1)


def test_a_missing_value_counts_as_a_failure_but_an_inapplicable_one_does_not():
    broken = ClipRow("b", "speech", "b", 1.0, (ConditionRow(DEEP, {}, {"metric": "silent"}, {"score": 0.0}),))
    rows = [row("a", score=1.0), broken, row("c")]
    excluded, official = (summarize(rows, [DEEP], [SCORE], policy)[0] for policy in ("exclude", "official"))
    assert excluded.num_failed == 1
    assert excluded.estimates["score"].mean == 1.0
    assert official.estimates["score"].mean == 0.5


def test_error_rates_are_quotients_of_sums():
    rows = [row("a", errors=1.0, words=1.0), row("b", errors=0.0, words=9.0)]
    assert summarize(rows, [DEEP], [RATE])[0].estimates["errors"].mean == 0.1


def test_domains_have_their_own_rows_and_one_for_all():
    lines = summarize([row("a", "speech", score=1.0), row("b", "music", score=2.0)], [DEEP, SHALLOW], [SCORE])
    assert [(line.domain, line.condition) for line in lines] == [("music", DEEP), ("speech", DEEP), ("all", DEEP)]
    assert lines[2].estimates["score"].mean == 1.5


def test_the_order_of_rows_changes_nothing():
    rows = [row(str(index), score=float(index % 7)) for index in range(30)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert summarize(rows, [DEEP], [SCORE]) == summarize(shuffled, [DEEP], [SCORE])


def test_the_interval_is_that_of_the_mean_of_a_normal_sample():
    values = np.random.default_rng(0).normal(5, 2, 400)
    estimate = bootstrap(np.stack([values, np.ones(400)], axis=1), seed=0)
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.04)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.04)
    assert bootstrap(np.array([[3.0, 1.0]]), seed=0).low == 3.0


def test_paired_differences_remove_what_the_clips_have_in_common():
    first = [row(str(index), score=index + 0.1) for index in range(20)]
    second = [row(str(index), score=float(index)) for index in range(1, 25)]
    difference = paired_difference(first, second, (DEEP, DEEP), SCORE)
    assert difference is not None
    assert difference.num_clips == 19
    assert difference.low == pytest.approx(0.1)
    assert difference.high == pytest.approx(0.1)
    assert paired_difference(first, [], (DEEP, DEEP), SCORE) is None


def test_the_difference_of_error_rates_is_that_of_the_table():
    """The one word that the first gets wrong counts as one of 101 words, not as half of the clips."""
    first = [row("long", errors=10.0, words=100.0), row("short", errors=1.0, words=1.0)]
    second = [row("long", errors=12.0, words=100.0), row("short", errors=0.0, words=1.0)]
    rates = [summarize(rows, [DEEP], [RATE])[0].estimates["errors"].mean for rows in (first, second)]
    difference = paired_difference(first, second, (DEEP, DEEP), RATE)
    assert difference is not None
    assert difference.mean == pytest.approx(rates[0] - rates[1])
    assert difference.mean == pytest.approx(-1 / 101)
    assert (difference.low, difference.high) == (pytest.approx(-0.02), pytest.approx(1.0))


@pytest.mark.parametrize(("num_clips", "is_sure"), [(2, False), (5, False), (6, True)])
def test_a_few_clips_of_one_sign_are_no_evidence(num_clips, is_sure):
    first = [row(str(index), score=index + 1.0) for index in range(num_clips)]
    second = [row(str(index), score=float(index)) for index in range(num_clips)]
    estimate = paired_difference(first, second, (DEEP, DEEP), SCORE)
    assert estimate is not None
    assert Difference("Score", True, DEEP, SHALLOW, estimate).is_sure == is_sure


def test_codebook_use_of_known_distributions():
    codes = torch.stack([torch.arange(16).repeat(1000), torch.zeros(16_000, dtype=torch.int64)])
    uniform, constant = codebook_usage(count_codes([codes[:, :7000], codes[:, 7000:]], [16, 16]))
    assert (uniform.usage, uniform.active_fraction, uniform.entropy, uniform.perplexity) == (1.0, 1.0, 4.0, 16.0)
    assert (constant.usage, constant.entropy, constant.perplexity, constant.max_probability) == (1 / 16, 0.0, 1.0, 1.0)
    assert effective_bitrate([uniform, constant], 12.5, 2) == 50.0
    assert effective_bitrate([uniform, constant], 12.5, 1) == 50.0
    assert codebook_usage(count_codes([], [16])) == []


def test_the_entropy_is_corrected_for_few_frames():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (1, 1000), generator=generator)
    (use,) = codebook_usage(count_codes([codes], [256]))
    share = torch.bincount(codes[0], minlength=256).double() / 1000
    plain = -(share[share > 0] * share[share > 0].log2()).sum().item()
    assert plain < 7.83
    assert plain < use.entropy
    assert use.entropy == pytest.approx(8.0, abs=0.06)
    assert use.expected_usage == pytest.approx(1 - (255 / 256) ** 1000)
    assert use.usage == pytest.approx(use.expected_usage, abs=0.03)


@pytest.fixture
def table() -> Table:
    rows = summarize([row("a", score=1.0), row("b", score=2.0)], [DEEP], [SCORE, RATE])
    return Table("x & y", (SCORE, RATE), tuple(rows), {8: 512.4}, {8: 0.25}, ("a note",))


def test_markdown_shows_means_and_the_direction(table):
    lines = markdown(table).splitlines()
    assert lines[2] == "| domain | system | levels | bps | eff. bps | Score ↑ | WER ↓ | RTF | valid/total |"
    assert lines[4] == "| speech | x | 8 | 800 | 512 | 1.50 | – | 0.250 | 2/2 |"
    assert lines[-1] == "- a note"


def test_a_plot_of_several_systems_has_a_line_for_each():
    first, second = (replace(DEEP, system=name, bitrate=800.0) for name in ("first", "second"))
    rows = summarize(
        [ClipRow("a", "speech", "k", 1.0, (ConditionRow(first, {"score": 1.0}), ConditionRow(second, {"score": 2.0})))],
        [first, second],
        [SCORE],
    )
    plot = bitrate_plot(SCORE, rows)
    assert plot is not None
    assert "speech, first" in plot
    assert "speech, second" in plot
    assert "speech, first" not in bitrate_plot(SCORE, rows[:1])


def test_csv_has_every_value(table):
    (line,) = csv.DictReader(comma_separated(table).splitlines())
    assert line["score"] == "1.5"
    assert (float(line["score_low"]), float(line["score_high"])) == (1.0, 2.0)
    assert (line["score_clips"], line["errors"], line["errors_clips"]) == ("2", "", "0")


def test_codebook_csv_has_a_line_per_level():
    levels = codebook_usage(count_codes([torch.zeros(3, 5, dtype=torch.int64)], [4, 4, 4]))
    lines = list(csv.DictReader(codebook_csv(levels).splitlines()))
    assert [line["level"] for line in lines] == ["1", "2", "3"]
    assert float(lines[0]["relative_entropy"]) == 0.0
    assert math.isclose(float(lines[0]["usage"]), 0.25)
