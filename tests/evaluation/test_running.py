"""Rendering, resuming, workers, pairs of files."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moss_train.audio.io import read_audio, resample, write_audio
from moss_train.evaluation.metrics.base import Pair
from moss_train.evaluation.reconstruct import (
    ClipReconstructions,
    CodecReconstructor,
    Condition,
    PairReconstructor,
    find_pairs,
    fit_length,
    mismatched_clips,
    pcm16,
)
from moss_train.evaluation.report.tables import comma_separated
from moss_train.evaluation.report.write import Evaluation, make_table, write_outputs
from moss_train.evaluation.results import ROWS_FILE, TIMES_FILE, ClipRow, ConditionRow, Results, all_conditions
from moss_train.evaluation.runner import evaluate
from moss_train.evaluation.statistics import mean_scores, summarize
from moss_train.utils.errors import UserError

from . import small_codec as small
from .small_codec import METRICS, run

PAIRS = Path(__file__).parents[1] / "data" / "metrics"


def test_a_clip_is_encoded_once_and_every_prefix_is_that_of_a_direct_decode():
    clips = small.tones(2)
    codec = small.BitCodec()
    reconstructor = CodecReconstructor(codec, (2, 8), clips)
    audio, rate = clips[0].read()
    rendered = reconstructor.reconstruct(clips[0], audio, rate)
    assert codec.num_encoded == 1
    conditions = [item.condition for item in rendered.reconstructions]
    assert set(conditions) == set(reconstructor.conditions)
    by_condition = {item.condition: item for item in rendered.reconstructions}
    for levels in (2, 8):
        item = by_condition[Condition("bits", levels, 24_000.0 * levels)]
        assert torch.equal(item.degraded, pcm16(codec.decode(codec.encode(audio)[:levels])))
        assert torch.equal(item.reference, pcm16(audio))
    ceiling = by_condition[Condition("resample-only")]
    assert torch.equal(ceiling.degraded, ceiling.reference)
    floor = by_condition[Condition("mismatched")]
    assert torch.equal(floor.degraded, pcm16(clips[1].read()[0]))


class DoublingCodec(small.BitCodec):
    """Encodes 24 kHz and decodes to 48 kHz, with every sample twice."""

    output_sampling_rate = 48_000

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return super().decode(codes).repeat_interleave(2, dim=-1)


def test_a_codec_of_two_rates_is_measured_at_that_of_its_output():
    original = torch.randn(1, 48_001, generator=torch.Generator().manual_seed(0)) * 0.1
    clips = [small.clip_of(original, "a"), *small.tones(1)]
    codec = DoublingCodec()
    rendered = CodecReconstructor(codec, (8,), clips).reconstruct(clips[0], original, 48_000)
    by_condition = {item.condition.system: item for item in rendered.reconstructions}
    item = by_condition["bits"]
    assert item.sampling_rate == 48_000
    assert torch.equal(item.reference, pcm16(original))
    encoded = codec.encode(resample(original, 48_000, 24_000))
    assert torch.equal(rendered.codes, encoded)
    assert torch.equal(item.degraded, pcm16(codec.decode(encoded)[:, :48_001]))
    assert torch.equal(by_condition["resample-only"].degraded, pcm16(original))
    assert by_condition["mismatched"].sampling_rate == 48_000


def test_more_levels_are_nearer_and_the_anchors_lie_beyond(tmp_path):
    evaluation, _ = run(tmp_path, small.tones(3))
    for row in evaluation.rows:
        values = {entry.condition: entry.values for entry in row.conditions}
        one, four, eight, ceiling, floor = (values[condition] for condition in evaluation.conditions)
        assert one["mel_loss"] > four["mel_loss"] > eight["mel_loss"] > ceiling["mel_loss"] == 0.0
        assert floor["si_sdr"] < one["si_sdr"] < four["si_sdr"] < eight["si_sdr"] < ceiling["si_sdr"]


def test_pcm16_is_what_a_file_gives_back(tmp_path):
    audio = torch.tensor([[0.5, -1.0, 1.5, 1e-6, -0.25]])
    write_audio(tmp_path / "x.wav", audio, 24_000)
    assert torch.equal(pcm16(audio), read_audio(tmp_path / "x.wav")[0])
    assert pcm16(torch.tensor([torch.nan])).isnan().all()
    assert fit_length(torch.ones(1, 3), 5).tolist() == [[1, 1, 1, 0, 0]]
    assert fit_length(torch.ones(1, 3), 2).shape == (1, 2)


def test_mismatched_clips_are_of_the_domain_and_of_other_speakers_in_any_order():
    audio = torch.ones(1, 10)
    clips = [small.clip_of(audio, str(i), "speech", speaker=f"s{i % 2}") for i in range(6)]
    clips += [small.clip_of(audio, f"m{i}", "music") for i in range(3)] + [small.clip_of(audio, "alone", "sound")]
    chosen = mismatched_clips(clips)
    domains = {clip.id: clip for clip in clips}
    for name, other in chosen.items():
        assert other.id != name
        assert other.domain == domains[name].domain
        if other.domain == "speech":
            assert other.labels["speaker"] != domains[name].labels["speaker"]
    assert "alone" not in chosen
    assert {name: clip.id for name, clip in mismatched_clips(clips[::-1]).items()} == {
        k: v.id for k, v in chosen.items()
    }


def awkward_clips():
    nan = torch.full((1, 24_000), torch.nan)
    odd = [
        small.clip_of(torch.zeros(1, 24_000), "silent"),
        small.clip_of(0.1 * torch.ones(1, 2400).cumsum(1).sin(), "short"),
        small.clip_of(nan, "nan"),
        small.clip_of(torch.zeros(1, 0), "empty"),
        small.unreadable("broken"),
    ]
    return [*small.tones(2), *odd]


def test_failures_are_counted_and_never_a_crash(tmp_path):
    evaluation, _ = run(tmp_path, awkward_clips())
    failures = {row.clip: row.failure for row in evaluation.rows if row.failure}
    assert failures == {
        "nan": "nan contains NaN or infinite samples",
        "empty": "empty has no samples",
        "broken": "broken is damaged",
    }
    silent = next(row for row in evaluation.rows if row.clip == "silent")
    assert all(entry.errors == {"si_sdr": "the reference is silent"} for entry in silent.conditions
               if entry.condition.system != "mismatched")  # fmt: skip
    text = write_outputs(evaluation, "exclude", 0, [])
    (line,) = [line for line in text.splitlines() if line.startswith("| speech | bits | 8")]
    assert line.endswith("| 3/7 |")
    assert "3 clips not read" in text


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files, without times."""
    names = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != TIMES_FILE]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}


def table_without_times(evaluation: Evaluation) -> str:
    evaluation.results.times.audio = 0.0
    return comma_separated(make_table(evaluation, evaluation.codebook_usage(), "exclude", 0))


@pytest.mark.processes
@pytest.mark.slow
def test_two_runs_and_workers_give_the_same_bytes(tmp_path):
    clips = awkward_clips()[:4]
    tables = []
    for name, options in (("one", {}), ("two", {}), ("workers", {"num_workers": 2})):
        evaluation, _ = run(tmp_path / name, clips, **options)
        tables.append(table_without_times(evaluation))
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "workers")
    assert tables[0] == tables[1] == tables[2]


@contextlib.contextmanager
def signalled_workers(rows: Path, number: signal.Signals) -> Iterator[None]:
    """Send a signal to one worker after the first row; before that it may still be starting."""
    reached = []

    def reach_workers() -> None:
        while not rows.exists() or not rows.read_text():
            time.sleep(0.01)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
            reached.append(worker.pid)

    thread = threading.Thread(target=reach_workers)
    thread.start()
    yield
    thread.join()
    assert len(reached) == 1


@pytest.mark.processes
def test_an_interrupt_is_for_the_parent_not_for_its_workers(tmp_path):
    """Ctrl-C is sent to all processes of a terminal; a worker that dies of it would break the pool or make it hang."""
    with signalled_workers(tmp_path / ROWS_FILE, signal.SIGINT):
        evaluation, _ = run(tmp_path, small.tones(8), num_workers=1)
    assert [row.failure for row in evaluation.rows] == [None] * 8


@pytest.mark.processes
def test_a_worker_that_is_killed_is_one_line(tmp_path):
    """As when the system is out of memory."""
    clips = small.tones(40)
    with (
        signalled_workers(tmp_path / ROWS_FILE, signal.SIGKILL),
        pytest.raises(OSError, match="a worker process ended abruptly"),
    ):
        run(tmp_path, clips, num_workers=1)
    evaluation, _ = run(tmp_path, clips)
    assert [row.failure for row in evaluation.rows] == [None] * 40


def test_the_order_of_the_clips_changes_no_mean(tmp_path):
    clips = small.tones(4)
    tables = []
    for name, order in (("forwards", clips), ("backwards", clips[::-1])):
        evaluation, _ = run(tmp_path / name, order)
        tables.append(table_without_times(evaluation))
    assert tables[0] == tables[1]


def test_an_interrupted_run_goes_on_and_ends_with_the_same_rows(tmp_path):
    clips = small.tones(4)
    run(tmp_path / "whole", clips)
    run(tmp_path / "cut", clips)
    rows = tmp_path / "cut" / ROWS_FILE
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:2]) + lines[2][:100])
    _, codec = run(tmp_path / "cut", clips)
    assert codec.num_encoded == 2
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    _, codec = run(tmp_path / "cut", clips)
    assert codec.num_encoded == 0


def test_further_levels_are_added_to_the_rows_and_give_those_of_one_run(tmp_path):
    clips = small.tones(3)
    run(tmp_path / "whole", clips, (1, 4, 8))
    evaluation, codec = run(tmp_path / "parts", clips, (1, 8))
    both = evaluation.conditions
    evaluation, codec = run(tmp_path / "parts", clips, (4,))
    assert codec.num_encoded == 3
    shown = all_conditions(evaluation.conditions, evaluation.rows)
    assert [entry.num_quantizers for entry in shown] == [1, 4, 8, None, None]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    _, codec = run(tmp_path / "parts", clips, (1, 4))
    assert codec.num_encoded == 0
    evaluation, codec = run(tmp_path / "parts", [*clips, small.clip_of(0.1 * clips[0].read()[0], "new")], (4,))
    shown = all_conditions(evaluation.conditions, evaluation.rows)  # without those that the new clip does not have yet
    assert [entry.num_quantizers for entry in shown] == [4, None, None]
    assert set(both) < set(all_conditions(both, evaluation.rows[:1]))


def test_the_time_of_levels_that_came_later_is_that_of_their_own_audio(tmp_path):
    results = Results(tmp_path, {"codec": "a"})
    codes = torch.zeros(2, 3)
    results.times.add(ClipReconstructions((), 10.0, codes, 5.0, {1: 1.0}))
    results.times.add(ClipReconstructions((), 10.0, codes, 5.0, {2: 2.0}))
    results.finish([])
    times = Results(tmp_path, {"codec": "a"}).times
    assert [times.factor(levels) for levels in (1, 2, 3)] == [0.6, 0.7, None]


def test_a_folder_that_was_bound_to_its_levels_is_gone_on_with(tmp_path):
    (tmp_path / "settings.json").write_text('{"codec": "a", "num_quantizers": [1]}')
    (tmp_path / TIMES_FILE).write_text('{"audio": 4.0, "encode": 2.0, "decode": {"1": 1.0}}')
    assert Results(tmp_path, {"codec": "a"}).times.factor(1) == 0.75


def test_rows_of_an_older_version_have_the_present_names_of_their_values(tmp_path):
    row = ClipRow("a", "speech", "k", 1.0, (ConditionRow(Condition("Cat", 4), {"text_lm_loss": 2.0, "stoi": 0.9}),))
    older = row.to_json().replace("text_lm_loss", "text_nats")
    assert ClipRow.from_json(older) == ClipRow.from_json(row.to_json()) == row


def test_a_name_with_another_separator_of_lines_keeps_its_row(tmp_path):
    clips = [small.clip_of(small.tones(1)[0].read()[0], "first\u2028second\x85third")]
    run(tmp_path, clips)
    evaluation, codec = run(tmp_path, clips)
    assert codec.num_encoded == 0
    assert [row.clip for row in evaluation.rows] == [clips[0].id]


def test_other_settings_need_another_folder(tmp_path):
    Results(tmp_path, {"codec": "a", "levels": [1]})
    with pytest.raises(UserError, match=r"codec was a and is b.*give another out"):
        Results(tmp_path, {"codec": "b", "levels": [1]})


def test_means_by_name_are_those_of_the_table(tmp_path):
    clips = [*small.tones(2), small.clip_of(small.tones(3)[2].read()[0], "s", "sound")]
    evaluation, _ = run(tmp_path, clips)
    conditions = [condition for condition in evaluation.conditions if condition.num_quantizers is not None]
    means = mean_scores(evaluation.rows, conditions, evaluation.columns)
    for row in summarize(evaluation.rows, conditions, evaluation.columns):
        for key, estimate in row.estimates.items():
            assert means.pop(f"{row.domain}/{key}/{row.condition.num_quantizers}") == estimate.mean
    assert means == {}


def test_means_of_one_domain_are_those_of_all(tmp_path):
    evaluation, _ = run(tmp_path, small.tones(2))
    means = mean_scores(evaluation.rows, evaluation.conditions, evaluation.columns)
    domains = {name.split("/")[0] for name in means}
    assert len(domains) == 2
    assert "all" in domains
    assert all(value == means["/".join(["all", *name.split("/")[1:]])] for name, value in means.items())


def test_a_codec_that_fails_on_a_clip_is_a_failure_of_that_clip():
    class Fragile(small.BitCodec):
        def encode(self, audio):
            raise RuntimeError("kernel larger than input\nmore")

    clips = small.tones(1)
    rendered = CodecReconstructor(Fragile(), (1,), clips).reconstruct(clips[0], *clips[0].read())
    assert rendered.failures[Condition("bits", 1, 24_000.0)] == "bits failed: kernel larger than input"


def test_the_official_layout_is_scored_as_it_was_released(tmp_path):
    for depth in (1, 32):
        target = tmp_path / "MOSS" / f"rvq{depth}" / "clips"
        target.mkdir(parents=True)
        for side in ("gt_audios", "syn_audios"):
            (target / side).symlink_to(PAIRS / side)
    reconstructor = PairReconstructor(find_pairs(tmp_path, "speech", 125.0), "speech")
    assert reconstructor.conditions == (Condition("MOSS", 1, 125.0), Condition("MOSS", 32, 4000.0))
    clips = reconstructor.clips()[:2]
    rows = evaluate(clips, reconstructor, METRICS, Results(tmp_path / "out", {}))
    expected = json.loads((PAIRS / "expected.json").read_text())["per_file"]
    for row in rows:
        assert row.domain == "clips"
        for entry in row.conditions:
            values = expected[f"{row.clip.removeprefix('clips/')}.flac"]
            assert entry.values["mel_loss"] == pytest.approx(values["mel_loss"], abs=1e-5)


def test_pairs_that_lack_a_side_are_failures_of_that_pair(tmp_path):
    for side in ("reference", "reconstruction"):
        (tmp_path / side).mkdir()
        write_audio(tmp_path / side / "a.wav", torch.ones(1, 8000).cumsum(1).sin(), 16_000)
    (tmp_path / "reference" / "a.wav").rename(tmp_path / "reference" / "a.WAV")
    write_audio(tmp_path / "reference" / "b.flac", torch.ones(1, 8000).cumsum(1).sin(), 16_000)
    reconstructor = PairReconstructor(find_pairs(tmp_path, "sound", None), "sound")
    rows = evaluate(reconstructor.clips(), reconstructor, METRICS, Results(tmp_path / "out", {}))
    assert rows[0].conditions[0].values["mel_loss"] == 0.0
    assert "has no b.flac or b.wav" in rows[1].conditions[0].failure
    with pytest.raises(UserError, match="has no folders gt_audios/ and syn_audios/"):
        find_pairs(tmp_path / "out", "sound", None)


def test_a_changed_reconstruction_is_scored_again(tmp_path):
    audio = torch.ones(1, 8000).cumsum(1).sin()
    for side in ("reference", "reconstruction"):
        (tmp_path / side).mkdir()
        write_audio(tmp_path / side / "a.wav", audio, 16_000)
    distances = []
    for gain in (1.0, 0.5):
        write_audio(tmp_path / "reconstruction" / "a.wav", gain * audio, 16_000)
        reconstructor = PairReconstructor(find_pairs(tmp_path, "sound", None), "sound")
        (row,) = evaluate(reconstructor.clips(), reconstructor, METRICS, Results(tmp_path / "out", {}))
        distances.append(row.conditions[0].values["mel_loss"])
    assert distances[0] == 0 < distances[1]


def test_stereo_is_averaged_and_each_rate_computed_once():
    pair = Pair(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.ones(1, 3), 16_000)
    reference, degraded = pair.at(16_000)
    assert reference.tolist() == [0.5, 0.5]
    assert degraded.shape == (2,)
    assert pair.at(16_000)[0] is reference
