"""Comparison of evaluations, and the HTML report, also in a browser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moss_train.evaluation.metrics.signal import PROFILES, SpectralDistances
from moss_train.evaluation.report.tables import compare, load_evaluation
from moss_train.evaluation.report.write import write_outputs
from moss_train.utils.errors import UserError

from . import small_codec as small
from .small_codec import METRICS, run


@pytest.fixture(scope="module")
def two_evaluations(tmp_path_factory) -> Path:
    """Create folders `first` and `second`, the second with fewer levels, and a report that compares them."""
    folder = tmp_path_factory.mktemp("evaluations")
    clips = small.tones(3)
    second, _ = run(folder / "second", clips, levels=(1, 4))
    write_outputs(second, "exclude", 0, [])
    first, _ = run(folder / "first", clips, levels=(1, 8), keep_audio_of=frozenset({"tone 0"}))
    write_outputs(first, "exclude", 0, [str(folder / "second")])
    return folder


def test_comparison_pairs_the_nearest_bitrates(two_evaluations):
    other = load_evaluation(two_evaluations / "second")
    clips = small.tones(3)
    evaluation, _ = run(two_evaluations / "first", clips, levels=(1, 8))
    comparison = compare(evaluation.rows, evaluation.conditions, METRICS, other)
    pairs = {(item.first.num_quantizers, item.second.num_quantizers) for item in comparison.differences}
    assert pairs == {(1, 1), (8, 4)}
    same = [item.estimate for item in comparison.differences if item.first.num_quantizers == 1]
    assert all(value.low == value.mean == value.high == 0 for value in same)
    deeper = next(
        item for item in comparison.differences if (item.column, item.first.num_quantizers) == ("Mel-Loss", 8)
    )
    assert deeper.estimate.high < 0
    assert comparison.skipped == {}


def test_metrics_of_other_definitions_are_not_compared(two_evaluations):
    other = load_evaluation(two_evaluations / "second")
    evaluation, _ = run(two_evaluations / "first", small.tones(3), levels=(1, 8))
    metrics = {"spectral": SpectralDistances(PROFILES["dac24k"])}
    comparison = compare(evaluation.rows, evaluation.conditions, metrics, other)
    assert comparison.differences == ()
    assert "24000 Hz" in comparison.skipped["spectral"]
    nothing = compare([], evaluation.conditions, METRICS, other)
    assert nothing.skipped == {"every metric": "the two have no clips in common"}
    with pytest.raises(UserError, match="no finished evaluation"):
        load_evaluation(two_evaluations)


def test_the_report_is_one_page_with_everything_inside(two_evaluations):
    pytest.importorskip("matplotlib")
    page = (two_evaluations / "first" / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert page.count("<audio") == 3  # the original and two numbers of levels
    assert page.count("<svg") == 4
    assert page.count('class="spectrogram"') == 1
    assert "Against second" in page
    assert "published" in page
    results = json.loads((two_evaluations / "first" / "results.json").read_text())
    assert results["schema_version"] == 1
    assert [level["level"] for level in results["codebooks"]] == list(range(1, 9))


LOADED = """
Promise.all([...document.querySelectorAll("audio")].map(player => new Promise(done => {
  if (player.readyState > 0 || player.error) return done(player.duration);
  player.onloadedmetadata = player.onerror = () => done(player.duration);
})))
"""
PLOTS = """[...document.querySelectorAll("figure svg")].map(plot => {
  const box = plot.getBoundingClientRect();
  return [box.width, box.height, plot.querySelectorAll("path").length];
})"""


def open_report(browser: Any, folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """Open the report; return the page and all messages of the browser console."""
    pytest.importorskip("matplotlib")
    page = browser.new_page(**options)
    page.set_default_timeout(120_000)
    console: list[str] = []
    page.on("console", lambda message: console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.goto((folder / "first" / "report.html").as_uri())
    return page, console


@pytest.mark.slow
def test_players_load_and_plots_are_seen(browser, two_evaluations):
    page, console = open_report(browser, two_evaluations)
    assert page.evaluate(LOADED) == [1.0, 1.0, 1.0]
    plots = page.evaluate(PLOTS)
    assert len(plots) == 4
    assert all(width > 200 and height > 100 and parts > 10 for width, height, parts in plots)
    assert page.evaluate("document.querySelector('.spectrogram').naturalWidth") > 200
    assert console == []


@pytest.mark.slow
def test_one_player_at_a_time(browser, two_evaluations):
    page, _ = open_report(browser, two_evaluations)
    playing = """(async () => {
      const [first, second] = document.querySelectorAll("audio");
      first.muted = second.muted = true;
      await first.play();
      await second.play();
      const states = [first.paused, second.paused];
      second.pause();
      return states;
    })()"""
    assert page.evaluate(playing) == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "is_phone"), [(1280, False), (390, True)])
def test_nothing_is_wider_than_the_page(browser, two_evaluations, width, is_phone):
    """On a phone only the tables scroll sideways, with a fixed first column; text keeps its full size."""
    size = {"width": width, "height": 844}
    page, console = open_report(
        browser, two_evaluations, viewport=size, is_mobile=is_phone, device_scale_factor=2 if is_phone else 1
    )
    needed, available = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert needed <= available == width
    assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") == 16
    first_column = "document.querySelector('.wide tbody td').getBoundingClientRect().left"
    before = page.evaluate(first_column)
    page.evaluate("document.querySelector('.wide').scrollLeft = 9")
    assert page.evaluate("document.querySelector('.wide').scrollLeft") == (9 if is_phone else 0)
    assert page.evaluate(first_column) == before
    assert console == []


@pytest.mark.slow
def test_the_console_is_seen(browser, two_evaluations):
    page, console = open_report(browser, two_evaluations)
    page.evaluate("console.error('something is wrong')")
    with page.expect_event("pageerror"):
        page.evaluate("setTimeout(() => { throw new Error('so is this') })")
    assert console == ["something is wrong", "so is this"]
