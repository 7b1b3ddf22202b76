"""Checkpoints on failing storage: killed writes, full disks, missing permissions, damaged and missing files."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moss_train.training.loggers.base import read_table
from moss_train.utils.checkpoint import CHECKPOINT_FILE

from .harness import FINISHED, FIRST, Fit, assert_same_run

pytestmark = pytest.mark.faults


@pytest.fixture
def begun(make_fit) -> Fit:
    return make_fit("begun").begin()


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_kill_anywhere_in_a_checkpoint_write_leaves_the_earlier_ones(whole: Fit, make_fit, background: str) -> None:
    """At byte offsets in the file, before the manifest, before the rename, and before and during retention."""
    begun = make_fit("begun", f"checkpoint.background={background}").begin()
    for fault in begun.kills_in_a_write():
        outcome = begun.run(fault=fault)
        assert outcome.status in (-signal.SIGKILL, -signal.SIGXFSZ), (fault, outcome.log[-3000:])
        begun.assert_sound(FIRST)
    outcome = begun.run(fault={"event": ["shutil.rmtree", "checkpoints/update-", 1]})
    assert outcome.status == -signal.SIGKILL
    begun.assert_sound([*FIRST, "update-00000006"])
    if background == "false":
        outcome = begun.run(fault={"event": ["os.remove", CHECKPOINT_FILE, 1]})
        assert outcome.status == -signal.SIGKILL
        assert "update-00000009" in begun.checkpoints
    begun.finish()
    begun.assert_sound(FINISHED)
    assert begun.leftovers() == []
    assert_same_run(begun, whole)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_temporary_files_on_another_file_system_change_nothing(whole: Fit, begun: Fit) -> None:
    """Lightning's own writer uses TMPDIR; if it is killed, the previous file is destroyed."""
    temporary = {"TMPDIR": "/dev/shm"}
    size = (begun.newest() / CHECKPOINT_FILE).stat().st_size
    before = set(os.listdir("/dev/shm"))
    outcome = begun.run(fault={"file_bytes_kill": size // 2}, environment=temporary)
    assert outcome.status == -signal.SIGXFSZ
    begun.assert_sound(FIRST)
    begun.finish(environment=temporary)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "checkpoint" in name}
    assert_same_run(begun, whole)


def test_a_full_disk_is_one_line_and_the_earlier_checkpoints_stay(whole: Fit, begun: Fit) -> None:
    size = (begun.newest() / CHECKPOINT_FILE).stat().st_size
    for fault in ({"file_bytes": size // 2}, {"file_bytes": size - 1}):
        outcome = begun.run(fault=fault)
        assert outcome.status == 2, outcome.log[-3000:]
        assert "moss_train fit: " in outcome.log
        assert "update-00000006: File too large, the checkpoint could not be written" in outcome.log
        assert "Traceback" not in outcome.log
        begun.assert_sound(FIRST)
        assert begun.leftovers() == []
    begun.finish()
    assert_same_run(begun, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_system_that_fills_up(whole: Fit, begun: Fit, small_disk: Path) -> None:
    fit = Fit(begun.launcher, small_disk / "run", begun.overrides)
    shutil.copytree(begun.directory, fit.directory)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(b"x" * max(0, shutil.disk_usage(small_disk).free - 100_000))
    outcome = fit.run()
    assert outcome.status == 2, outcome.log[-3000:]
    assert "No space left on device" in outcome.log
    assert "Traceback" not in outcome.log
    fit.assert_sound(FIRST)
    filler.unlink()
    fit.finish()
    assert_same_run(fit, whole)


def test_no_permission_is_one_line_and_the_earlier_checkpoints_stay(whole: Fit, begun: Fit) -> None:
    """A read-only run directory, read-only checkpoints, and checkpoints that cannot even be listed."""
    checkpoints = begun.directory / "checkpoints"
    for folder, mode in ((begun.directory, 0o500), (checkpoints, 0o500), (checkpoints, 0o300)):
        folder.chmod(mode)
        try:
            outcome = begun.run(fault={"no_override": True})
        finally:
            folder.chmod(0o700)
        assert outcome.status == 2, outcome.log[-3000:]
        assert "Permission denied" in outcome.log
        assert str(folder) in outcome.log
        assert "Traceback" not in outcome.log
        begun.assert_sound(FIRST)
    begun.finish()
    assert_same_run(begun, whole)


def test_a_slow_disk_costs_time_and_says_so(whole: Fit, make_fit) -> None:
    """Every flush takes 0.2 s, with four per checkpoint; SIGTERM arrives twice while one is written."""
    fit = make_fit("slow", "checkpoint.every_updates=2")
    job = fit.start(fault={"slow_sync": 0.2})
    while not (fit.directory / "checkpoints" / ".partial-update-00000002").exists() and job.poll() is None:
        time.sleep(0.01)
    for _ in range(2):
        job.send(signal.SIGTERM)
    outcome = job.wait()
    assert outcome.status == 128 + signal.SIGTERM, outcome.log[-3000:]
    assert "stopped by SIGTERM at update 3; the same command resumes from there" in outcome.log
    fit.assert_sound(["update-00000002", "update-00000003"])
    outcome = fit.finish(fault={"slow_sync": 0.2})
    assert_same_run(fit, whole)
    seconds = {
        int(row["update"]): float(row["checkpoint_seconds"]) for row in read_table(fit.directory / "metrics.csv")
    }
    assert all(seconds[update] >= 0.8 for update in (3, 5, 7, 9, 11))
    assert [update for update in seconds if not seconds[update]] == [2, 4, 6, 8, 10, 12]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_or_lost_newest_checkpoint_makes_way_for_the_one_before(whole: Fit, begun: Fit) -> None:
    flip(begun.newest() / CHECKPOINT_FILE)
    outcome = begun.finish("max_updates=4")
    assert "update-00000004 is damaged" in outcome.log
    begun.assert_sound(FIRST)
    shutil.rmtree(begun.newest())  # removed completely
    begun.finish()
    begun.assert_sound(FINISHED)
    assert_same_run(begun, whole)


def test_without_a_sound_checkpoint_nothing_starts_from_scratch(begun: Fit) -> None:
    metrics = (begun.directory / "metrics.csv").read_bytes()
    for name in FIRST:
        flip(begun.directory / "checkpoints" / name / CHECKPOINT_FILE)
    outcome = begun.run()
    assert outcome.status == 2
    assert "all 2 checkpoints in" in outcome.log
    assert begun.checkpoints == FIRST
    shutil.rmtree(begun.directory / "checkpoints")
    outcome = begun.run()
    assert outcome.status == 2
    assert "has a metrics.csv but no checkpoints any more" in outcome.log
    assert (begun.directory / "metrics.csv").read_bytes() == metrics


def test_a_kill_between_two_writes_of_the_metrics_loses_no_row(whole: Fit, begun: Fit) -> None:
    for event in (["open", "metrics.csv", 2], ["os.rename", "config.yaml", 1]):
        rows = begun.rows()
        outcome = begun.run(fault={"event": event})
        assert outcome.status == -signal.SIGKILL, outcome.log[-3000:]
        assert begun.rows() == rows
    begun.finish()
    assert_same_run(begun, whole)


def test_a_damaged_record_of_the_run_is_one_line_or_does_not_matter(whole: Fit, begun: Fit) -> None:
    """A broken table is named and nothing is changed; warnings and skipped updates are only for people."""
    metrics = begun.directory / "metrics.csv"
    content, checkpoints = metrics.read_bytes(), begun.checkpoints
    for damage, message in ((b"\xff\xfe\n1,2\n", "is damaged ('utf-8' codec"), (b"a,b\n1,2\n", "has no column update")):
        metrics.write_bytes(damage)
        outcome = begun.run()
        assert outcome.status == 2, outcome.log[-3000:]
        assert message in outcome.log
        assert "Traceback" not in outcome.log
        assert metrics.read_bytes() == damage
        assert begun.checkpoints == checkpoints
    metrics.write_bytes(content + bytes(300))  # as after a power failure
    (begun.directory / "warnings.txt").write_bytes(b"update 3: \xff\n\xfe\0")
    (begun.directory / "skipped.jsonl").write_text('{"update": 2}\n{"upd')
    begun.finish()
    assert_same_run(begun, whole)
    assert "1 updates skipped as not finite, samples in skipped.jsonl: [2]" in (
        begun.directory / "summary.md"
    ).read_text("utf-8")


def test_a_full_disk_is_one_line_for_every_command_that_writes(begun: Fit, tmp_path: Path) -> None:
    """Half-written output is not mistaken for complete: the same command succeeds once there is space."""
    model = tmp_path / "model"
    recordings = Path(__file__).parents[2] / "recipes" / "quickstart" / "audio" / "sound"
    commands = (
        (("export", f"checkpoint={begun.directory}", f"out={model}"), 40_000),
        (("encode", f"model={model}", f"input={recordings}", f"out={tmp_path / 'codes'}"), 900),
        (("decode", f"model={model}", f"input={tmp_path / 'codes'}", f"out={tmp_path / 'audio'}"), 2000),
        (("pack", f"input={recordings}", f"out={tmp_path / 'packed'}"), 100_000),
    )
    for command, room in commands:
        outcome = begun.launcher.run(*command, fault={"file_bytes": room})
        assert outcome.status == 2, outcome.log[-3000:]
        assert f"moss_train {command[0]}: " in outcome.log
        assert str(tmp_path) in outcome.log.splitlines()[-1]
        assert "Traceback" not in outcome.log
        outcome = begun.launcher.run(*command)
        assert outcome.status == 0, outcome.log[-3000:]
    written = [model / "model.safetensors", *(tmp_path / "codes").rglob("*.safetensors")]
    assert len(written) > 100
    assert {path.stat().st_mode for path in written} == {(model / "config.json").stat().st_mode}
