"""The simulated cluster at a small size: the checks pass, and an injected fault is detected."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    """Import the script as a module; a module that it imports is in the same folder."""
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("simulate_cluster")
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def options(tool):
    return tool.arguments(
        ["--num-shards=600", "--num-ranks=32", "--num-updates=6", "--num-positions=40000", "--batch-seconds=3000"]
    )


@pytest.fixture(scope="module")
def report(tool, options):
    return tool.simulate(options)


def test_a_small_cluster_passes_every_check(tool, options, report, capsys: pytest.CaptureFixture) -> None:
    assert len(report.checks()) == 7
    assert all(report.checks().values())
    assert report.largest_error < 0.01
    assert 480_000 < report.num_clips < 720_000
    tool.print_report(report, options)
    printed = capsys.readouterr().out
    assert "ranks x workers                        32 x 8" in printed
    assert printed.count("\nyes  ") == 7


def test_ranks_are_equal(report) -> None:
    ranks = report.ranks
    assert (ranks.batches.least, ranks.batches.most) == (6, 6)
    assert ranks.clips.most - ranks.clips.least <= 6
    assert 3000 / 32 - 11.7 < ranks.seconds.least <= ranks.seconds.most < 3000 / 32 + 18


def test_starting_takes_little(report) -> None:
    assert report.start.start_seconds < 30
    assert report.start.megabytes < 200


def test_what_is_wrong_is_said(report) -> None:
    shares = report.mixture.shares | {"sound": report.mixture.shares["sound"] * 1.05}
    wrong = replace(report, mixture=replace(report.mixture, shares=shares), same_after_resume=False)
    failed = [name for name, passed in wrong.checks().items() if not passed]
    assert len(failed) == 2
    assert failed[0].startswith("shares of the domains within 1 % of their weights (")
    assert failed[1] == "the same samples after a resume at another update"


def test_a_pass_that_leaves_a_clip_out_is_noticed(tool, options, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    corpus = tool.load_corpus(tool.write_indexes(tmp_path, 60))
    assert tool.reads_each_once(corpus, "sound", seed=0)
    rows = tool.DomainOrder.rows
    monkeypatch.setattr(tool.DomainOrder, "rows", lambda *given: rows(*given).clip(min=rows(*given).min() + 1))
    assert not tool.reads_each_once(corpus, "sound", seed=0)


def test_more_positions_than_one_pass_are_refused(tool, options, tmp_path) -> None:
    stream = tool.make_stream(tool.load_corpus(tool.write_indexes(tmp_path, 60)), 0)
    with pytest.raises(SystemExit, match="=10000 is more than one pass of sound; give fewer"):
        tool.report_mixture(stream, 10_000)
