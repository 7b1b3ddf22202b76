"""`pack` with processes, killed and started again: the same bytes as in one go, and no finished shard is made twice."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moss_train.commands import pack as pack_command
from moss_train.config.schema import PackConfig
from moss_train.data.pack.manifest import list_clips
from moss_train.data.pack.pack import pack
from moss_train.data.pack.resume import resumable_directory, unfinished_folder
from moss_train.utils.errors import UserError

from ..faults.harness import Launcher

SHARD_BYTES = 300_000


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class StopError(Exception):
    pass


def stop_after(count: int) -> Callable[[float], None]:
    calls = iter(range(count))

    def on_clip(seconds: float) -> None:
        if next(calls, None) is None:
            raise StopError

    return on_clip


def test_processes_make_the_same_bytes(packed: Path, tmp_path: Path, pack_config: Callable, recordings: Path) -> None:
    config = pack_config(input=recordings / "train.jsonl", out=tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert pack_command.run(config.replace(num_workers=3)) == 0
    assert bytes_of(tmp_path / "out") == bytes_of(packed)


@pytest.mark.parametrize("stops", [[60], [30, 60, 100]])
def test_a_stopped_job_goes_on_after_its_finished_shards(
    packed: Path, tmp_path: Path, recordings: Path, stops: list[int]
) -> None:
    sources, target, kept = list_clips(recordings / "train.jsonl", "audio"), tmp_path / "out", {}
    options = PackConfig("in", target, shard_bytes=SHARD_BYTES, num_workers=1)
    for count in stops:
        with pytest.raises(StopError):
            pack(sources, options, on_clip=stop_after(count))
        folder = unfinished_folder(target)
        now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
        finished = {json.loads(line)["file"] for line in (folder / "journal.jsonl").read_text().splitlines()}
        assert {name: now[name] for name in kept} == kept
        kept = {name: now[name] for name in finished}
        assert kept
        assert not target.exists()
    report = pack(sources, options)
    assert report.num_resumed == len(kept)
    assert {name: (target / name).stat().st_mtime_ns for name in kept} == kept
    assert bytes_of(target) == bytes_of(packed)
    assert not unfinished_folder(target).exists()


def test_changed_input_options_or_shards_are_packed_anew(packed: Path, tmp_path: Path, recordings: Path) -> None:
    sources, target = list_clips(recordings / "train.jsonl", "audio"), tmp_path / "out"
    options = PackConfig("in", target, shard_bytes=SHARD_BYTES, num_workers=1)
    with pytest.raises(StopError):
        pack(sources, options, on_clip=stop_after(100))
    folder = unfinished_folder(target)
    names = [json.loads(line)["file"] for line in (folder / "journal.jsonl").read_text().splitlines()]
    damaged = bytearray((folder / names[0]).read_bytes())
    damaged[2000] ^= 1
    (folder / names[0]).write_bytes(damaged)
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(b'{"file": "cut of')  # what a kill leaves of a line
    domain = names[0].rpartition("-")[0]
    report = pack(sources, options)
    assert report.num_resumed == sum(not name.startswith(domain) for name in names)
    assert bytes_of(target) == bytes_of(packed)
    with pytest.raises(StopError):
        pack(sources, options.replace(out=tmp_path / "two"), on_clip=stop_after(100))
    assert pack(sources, options.replace(out=tmp_path / "two", min_seconds=0.2)).num_resumed == 0


@pytest.mark.faults
def test_a_killed_command_is_resumed_and_its_processes_end(
    launcher: Launcher, packed: Path, tmp_path: Path, recordings: Path, pack_config: Callable
) -> None:
    target = tmp_path / "out"
    command = ["pack", f"input={recordings / 'train.jsonl'}", f"out={target}"]
    process = launcher.start(*command, f"shard_bytes={SHARD_BYTES}", "num_workers=2")
    journal = unfinished_folder(target) / "journal.jsonl"
    while not journal.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send(signal.SIGKILL)
    process.wait()
    if not target.exists():  # else it was faster than the kill
        assert journal.exists()
    deadline = time.monotonic() + 20
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, "worker processes outlive the command"
        time.sleep(0.1)
    config = pack_config(input=recordings / "train.jsonl", out=target, shard_bytes=SHARD_BYTES, overwrite=True)
    assert pack_command.run(config) == 0
    assert bytes_of(target) == bytes_of(packed)


def group_is_alive(group: int) -> bool:
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        states += [fields[0]] if int(fields[2]) == group else []
    return any(state != "Z" for state in states)


def test_two_jobs_do_not_write_the_same_folder(tmp_path: Path) -> None:
    with resumable_directory(tmp_path / "out") as folder:
        (folder / "file").touch()
        with (
            pytest.raises(UserError, match=r"out is in use by another process"),
            resumable_directory(tmp_path / "out"),
        ):
            pass
    assert (tmp_path / "out" / "file").exists()
