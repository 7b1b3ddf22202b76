"""Checkpoints that a thread writes beside the training (`checkpoint.background=true`): kills, full disks, signals.

The disk is made slow, so that a write lasts over several updates and is under way when something happens.
"""

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from moss_train.utils.checkpoint import CHECKPOINT_FILE, find_damage

from .harness import SCALE, Fit, assert_same_run

pytestmark = pytest.mark.faults

BACKGROUND = "checkpoint.background=true"
SLOW = {"slow_sync": 0.15}
"""Seconds for each of the four flushes of a checkpoint: an update takes some hundredths."""

CALLS_PER_UPDATE = 30_000
FIRST = ["update-00000003", "update-00000004"]
FINISHED = ["update-00000006", "update-00000009", "update-00000012"]


@pytest.fixture
def begun(make_fit: Callable[..., Fit]) -> Fit:
    """A run that stopped after four updates, with two checkpoints."""
    fit = make_fit("begun", BACKGROUND)
    fit.finish("max_updates=4")
    assert fit.checkpoints == FIRST
    return fit


def assert_sound(fit: Fit) -> None:
    """No half checkpoint has the name of one, whatever came to the process."""
    damage = {name: find_damage(fit.directory / "checkpoints" / name) for name in fit.checkpoints}
    assert set(damage.values()) <= {None}, damage


def leftovers(fit: Fit) -> list[Path]:
    return [path for path in (fit.directory / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("seed", range(2 * SCALE))
def test_killed_runs_end_like_the_whole_one(whole: Fit, make_fit: Callable[..., Fit], seed: int) -> None:
    """Three kills each; the writer of the first seed is fast, so that a kill comes after a write, too."""
    generator, fit, kills = random.Random(seed), make_fit("killed", BACKGROUND), 0
    for _ in range(3):
        place = ["CatModule.training_step", generator.randint(1, 4), generator.randrange(CALLS_PER_UPDATE)]
        outcome = fit.run(fault={"calls": place, **(SLOW if seed % 2 else {})})
        assert_sound(fit)
        if outcome.status == 0:
            break
        assert outcome.status == -signal.SIGKILL, outcome.log[-3000:]
        kills += 1
    assert kills >= 2
    fit.finish()
    assert_same_run(fit, whole)


def test_a_kill_anywhere_in_a_write_leaves_the_earlier_checkpoints(whole: Fit, begun: Fit) -> None:
    """In the middle of the file and near its end, before the manifest, before the rename, and in the retention."""
    for fault in begun.kills_in_a_write():
        outcome = begun.run(fault=fault)
        assert outcome.status in (-signal.SIGKILL, -signal.SIGXFSZ), (fault, outcome.log[-3000:])
        assert begun.checkpoints == FIRST
        assert_sound(begun)
    outcome = begun.run(fault={"event": ["shutil.rmtree", "checkpoints/update-", 1]})
    assert outcome.status == -signal.SIGKILL
    assert begun.checkpoints == [*FIRST, "update-00000006"]
    assert_sound(begun)
    begun.finish()
    assert begun.checkpoints == FINISHED
    assert_sound(begun)
    assert leftovers(begun) == []
    assert_same_run(begun, whole)


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
    assert int(begun.rows()[-1]["update"]) <= 9  # where the next checkpoint would have been
    assert begun.checkpoints == FIRST
    assert_sound(begun)
    assert leftovers(begun) == []
    begun.finish()
    assert_same_run(begun, whole)


def test_the_end_waits_for_the_last_write(whole: Fit, make_fit: Callable[..., Fit]) -> None:
    fit = make_fit("slow", BACKGROUND)
    fit.finish(fault={"slow_sync": 0.4})
    assert fit.checkpoints == FINISHED
    assert_sound(fit)
    assert leftovers(fit) == []
    assert_same_run(fit, whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_during_a_write_waits_for_it_and_a_resume_goes_on(
    whole: Fit, make_fit: Callable[..., Fit], number: signal.Signals, status: int
) -> None:
    """Right after the checkpoint of update 3 began to be written; after SIGTERM the run writes one more."""
    fit = make_fit("stopped", BACKGROUND)
    fault = {"calls": ["CatModule.training_step", 4, 100], "signal": number, "slow_sync": 0.4}
    outcome = fit.run(fault=fault)
    assert outcome.status == status, outcome.log[-3000:]
    assert "Traceback" not in outcome.log
    assert fit.newest().name == ("update-00000004" if number == signal.SIGTERM else "update-00000003")
    assert_sound(fit)
    assert leftovers(fit) == []
    fit.finish()
    assert_same_run(fit, whole)
