"""SIGKILL anywhere: after a resume all numbers, weights and moments are those of the undisturbed run."""

import os
import signal
import time
from pathlib import Path

import pytest

from moss_train.training.loggers.base import read_table

from .harness import KILLS_PER_RUN, SCALE, Fit, assert_same_run

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("seed", range(2 * SCALE))
def test_killed_runs_end_like_the_whole_one(whole: Fit, make_fit, seed: int) -> None:
    """Both stages, LM, quantizer dropout and accumulated gradients; workers 2 and 0, nightly also 1."""
    fit = make_fit("killed", f"data.num_workers={(2, 0, 1)[seed % 3]}")
    assert fit.finish_after_kills(seed) >= KILLS_PER_RUN - 1
    assert_same_run(fit, whole)


def test_averaged_weights_and_rates_per_part_survive_kills(make_fit) -> None:
    options = ("ema={decay: 0.9}", "optimizers.generator.learning_rate_scale.encoder=0.5", "data.num_workers=1")
    fit, undisturbed = make_fit("killed", *options), make_fit("whole", *options)
    undisturbed.finish()
    assert fit.finish_after_kills(100) >= KILLS_PER_RUN - 1
    assert_same_run(fit, undisturbed)
    assert "0.9" in (fit.directory / "config.yaml").read_text()
    assert any("ema" in name or "average" in name for name in fit.state())


def test_stops_and_resumes_anywhere(whole: Fit, make_fit) -> None:
    """At the start, inside a stage, twice between the stages, and after the last update."""
    fit = make_fit("stopped")
    for stop in (0, 4, 6, 6, 12):
        fit.finish(f"max_updates={stop}")
        assert fit.newest().name == f"update-{stop:08d}"
    assert "finished at update 12 of 12" in fit.finish().log
    assert_same_run(fit, whole)


def test_ctrl_c_ends_with_130_and_a_resume_goes_on(whole: Fit, make_fit) -> None:
    fit = make_fit("interrupted")
    outcome = fit.run(fault={"calls": ["CatModule.training_step", 5, 100], "signal": signal.SIGINT})
    assert outcome.status == 130, outcome.log[-3000:]
    assert "moss_train fit: interrupted" in outcome.log
    assert "Traceback" not in outcome.log
    fit.finish()
    assert_same_run(fit, whole)


def test_sigterm_during_a_validation_waits_for_it_and_a_resume_goes_on(make_fit, packed: Path) -> None:
    validation = {"data": packed, "max_clips": 2, "every_updates": 3, "samples_clips": "null"}
    options = [f"validation.{name}={value}" for name, value in validation.items()]
    fit, undisturbed = make_fit("stopped", *options), make_fit("whole", *options)
    undisturbed.finish()
    outcome = fit.run(fault={"calls": ["validate", 1, 100], "signal": signal.SIGTERM})
    assert outcome.status == 128 + signal.SIGTERM, outcome.log[-3000:]
    update = int(fit.newest().name.rpartition("-")[2])
    assert 0 < update < 12
    assert [int(row["update"]) for row in read_table(fit.directory / "validation.csv")][-1] <= update
    fit.finish()
    assert_same_run(fit, undisturbed)
    tables = [read_table(run.directory / "validation.csv") for run in (fit, undisturbed)]
    scores = [[(row["update"], row["mel_distance"], row["text_lm_loss"]) for row in table] for table in tables]
    assert scores[0] == scores[1]
    assert [row[0] for row in scores[0]] == ["0", "3", "6", "9", "12"]


@pytest.mark.parametrize(
    ("how", "message"), [("kill", "killed by signal"), ("hang", "DataLoader timed out after 5 seconds")]
)
def test_a_lost_data_worker_ends_the_run_and_nothing_else_is_lost(whole: Fit, make_fit, how: str, message: str) -> None:
    """As with the out-of-memory killer or a dead network disk: no process waits for a batch for ever."""
    fit = make_fit("worker", "data.num_workers=2")
    limit = {"moss_train.data.stream.loader.WORKER_TIMEOUT_SECONDS": 5}
    outcome = fit.run(fault={"worker": [4, how], "constants": limit if how == "hang" else {}})
    assert outcome.status > 0, outcome.log[-3000:]
    assert message in outcome.log
    fit.finish()
    assert_same_run(fit, whole)


def test_ctrl_c_twice_in_a_terminal_loses_nothing(whole: Fit, make_fit) -> None:
    """A terminal also sends it to the data workers, and an impatient user sends it twice."""
    fit = make_fit("interrupted", "data.num_workers=2")
    job = fit.start()
    while not (fit.directory / "metrics.csv").exists() or len(fit.rows()) < 2:
        assert job.poll() is None, job.wait().log[-3000:]
        time.sleep(0.02)
    for _ in range(2):
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGINT)
        time.sleep(0.05)
    assert job.wait().status in (130, -signal.SIGINT)
    fit.finish()
    assert_same_run(fit, whole)
