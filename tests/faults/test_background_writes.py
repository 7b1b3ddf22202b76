"""Checkpoints written by a thread during training (`checkpoint.background=true`): kills, full disks, signals.

The disk is slowed down, so that a write takes several updates and is still running when the fault happens.
"""

import signal
from collections.abc import Callable

import pytest

from moss_train.utils.checkpoint import CHECKPOINT_FILE

from .harness import FINISHED, FIRST, KILLS_PER_RUN, SCALE, Fit, assert_same_run

pytestmark = pytest.mark.faults

BACKGROUND = "checkpoint.background=true"
SLOW = {"slow_sync": 0.15}
"""Seconds for each of the four flushes of a checkpoint: an update takes some hundredths."""


@pytest.fixture
def begun(make_fit: Callable[..., Fit]) -> Fit:
    return make_fit("begun", BACKGROUND).begin()


@pytest.mark.parametrize("seed", range(2 * SCALE))
def test_killed_runs_end_like_the_whole_one(whole: Fit, make_fit: Callable[..., Fit], seed: int) -> None:
    """Three kills each. Writes of the first seed are fast, so that one kill comes after a write."""
    fit = make_fit("killed", BACKGROUND)
    assert fit.finish_after_kills(seed, **(SLOW if seed % 2 else {})) >= KILLS_PER_RUN - 1
    assert_same_run(fit, whole)


@pytest.mark.parametrize("last", [12, 6])
def test_a_full_disk_is_one_line_at_the_next_checkpoint_or_the_end(whole: Fit, begun: Fit, last: int) -> None:
    size = (begun.newest() / CHECKPOINT_FILE).stat().st_size
    outcome = begun.run(f"max_updates={last}", fault={"file_bytes": size // 2})
    assert outcome.status == 2, outcome.log[-3000:]
    said = [line for line in outcome.log.splitlines() if "could not be written" in line]
    assert len(said) == 1, outcome.log
    assert said[0].startswith("moss_train fit: ")
    assert "update-00000006: File too large, the checkpoint could not be written" in said[0]
    assert "Traceback" not in outcome.log
    assert int(begun.rows()[-1]["update"]) <= 9  # the update of the next checkpoint
    begun.assert_sound(FIRST)
    assert begun.leftovers() == []
    begun.finish()
    assert_same_run(begun, whole)


def test_the_end_waits_for_the_last_write(whole: Fit, make_fit: Callable[..., Fit]) -> None:
    fit = make_fit("slow", BACKGROUND)
    fit.finish(fault={"slow_sync": 0.4})
    fit.assert_sound(FINISHED)
    assert fit.leftovers() == []
    assert_same_run(fit, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_during_a_write_waits_for_it_and_a_resume_goes_on(
    whole: Fit, make_fit: Callable[..., Fit], number: signal.Signals, status: int
) -> None:
    """SIGTERM arrives right after the write of checkpoint 3 has started; the run then writes one more checkpoint."""
    fit = make_fit("stopped", BACKGROUND)
    fault = {"calls": ["CatModule.training_step", 4, 100], "signal": number, "slow_sync": 0.4}
    outcome = fit.run(fault=fault)
    assert outcome.status == status, outcome.log[-3000:]
    assert "Traceback" not in outcome.log
    assert fit.newest().name == ("update-00000004" if number == signal.SIGTERM else "update-00000003")
    fit.assert_sound()
    assert fit.leftovers() == []
    fit.finish()
    assert_same_run(fit, whole)
