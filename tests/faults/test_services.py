"""Servers that are down, slow or wrong, and such ranks: the run continues or ends within a stated time."""

import functools
import http.server
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from moss_train.data.shards import remote
from moss_train.data.shards.index import ShardIndex
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.stream import AudioStream, ClipFormat

from ..local_server import serving
from .harness import Fit, Launcher, assert_same_run

pytestmark = pytest.mark.faults

NO_SERVER = "http://127.0.0.1:9"
"""The discard port: nobody listens."""


@pytest.mark.parametrize("where", ["down", pytest.param("silent", marks=pytest.mark.nightly)])
def test_training_does_not_need_wandb(whole: Fit, make_fit, where: str) -> None:
    """A server that is down, and one that accepts the connection but never answers: a warning, and the same run."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = NO_SERVER if where == "down" else f"http://127.0.0.1:{silent.getsockname()[1]}"
        fit = make_fit(where)
        outcome = fit.finish(
            "wandb=online",
            environment={"WANDB_BASE_URL": server, "WANDB_API_KEY": "0" * 40, "NO_PROXY": "*"},
            fault={"constants": {"moss_train.training.loggers.wandb.INIT_SECONDS": 3.0}},
        )
    assert "wandb is offline" in outcome.log
    assert_same_run(fit, whole)


class BadServer(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, except for one file: half of it and then nothing, a closed connection, or an error."""

    bad = ""
    how = ""
    requests: ClassVar[list[str]] = []
    release = threading.Event()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name != self.bad:
            super().do_GET()
            return
        self.requests.append(name)
        if self.how == "error":
            self.send_error(500)
            return
        content = (Path(self.directory) / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if self.how == "stall":
            self.release.wait(60)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[BadServer]]]:
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 0.5)
    handler = type("Handler", (BadServer,), {"release": threading.Event(), "requests": []})
    with serving(functools.partial(handler, directory=str(packed))) as url:
        yield url, handler
        handler.release.set()


@pytest.mark.parametrize("how", ["stall", "half", "error"])
def test_a_shard_that_does_not_come_is_given_up_and_named(packed: Path, served, how: str) -> None:
    """After a few attempts its clips are dropped by name, without new attempts for each; all others are read."""
    url, handler = served
    index = ShardIndex.load(packed)
    number = max(range(len(index.shards)), key=lambda number: index.shards[number].num_clips)
    handler.bad, handler.how = index.shards[number].file, how
    stream = AudioStream([url], ClipFormat(24000, 1, 1920), crop_seconds=30.0)
    seconds = sum(stream.available_seconds.values())
    start = time.monotonic()
    loader = make_loader(stream, text_encoder=None, position=0, updates=[(0, seconds)], micro_batch_seconds=60.0)
    (update,) = loader
    found = sum(batch.num_clips for batch in update.micro_batches)
    assert len(update.dropped) == index.shards[number].num_clips
    assert found + len(update.dropped) == len(index)
    assert all(f"{handler.bad} after {remote.ATTEMPTS} attempts" in reason for _, reason, _ in update.dropped)
    assert 1 < len(handler.requests) <= remote.ATTEMPTS  # one may use a connection already closed
    assert time.monotonic() - start < 60


def test_a_slow_rank_is_waited_for_and_changes_nothing(make_fit) -> None:
    """One of two processes is stopped for some seconds; the results do not change."""
    usual, slow = make_fit("usual"), make_fit("slow")
    for job in usual.start_ranks():
        assert job.wait().status == 0
    jobs = slow.start_ranks()
    while not slow.checkpoints and jobs[0].poll() is None:
        time.sleep(0.05)
    jobs[1].send(signal.SIGSTOP)
    time.sleep(3)
    jobs[1].send(signal.SIGCONT)
    for job in jobs:
        outcome = job.wait()
        assert outcome.status == 0, outcome.log[-3000:]
    assert_same_run(slow, usual)


def test_a_rank_that_never_answers_ends_the_run_within_the_limit(make_fit) -> None:
    """One process is stopped for ever; after trainer.timeout_seconds the other one fails with an error."""
    fit = make_fit("stuck", "trainer.timeout_seconds=8", "stages.0.updates=10000")
    jobs = fit.start_ranks()
    while not fit.checkpoints and jobs[0].poll() is None:
        time.sleep(0.05)
    jobs[1].send(signal.SIGSTOP)
    try:
        outcome = jobs[0].wait(90)
        assert outcome.status not in (0, None), outcome.log[-3000:]
        assert "imed out" in outcome.log or "imeout" in outcome.log
    finally:
        os.killpg(jobs[1].pid, signal.SIGKILL)
        jobs[1].wait()


def test_ranks_with_fewer_samples_than_others_do_as_many_updates(
    launcher: Launcher, packed: Path, tmp_path: Path
) -> None:
    """A corpus of one shard for two ranks, with updates so small that one clip fills them."""
    fit = Fit(
        launcher, tmp_path / "few", (f"data.train={one_shard(packed, tmp_path / 'one')}", "stages.0.batch_seconds=0.1")
    )
    for job in fit.start_ranks():
        outcome = job.wait()
        assert outcome.status == 0, outcome.log[-3000:]
    assert [row["update"] for row in fit.rows()] == [str(number) for number in range(1, 13)]
    assert {row["clips"] for row in fit.rows()[:6]} == {"1"}  # the other rank has none of them


def one_shard(packed: Path, folder: Path) -> Path:
    """Create a packed folder of three clips."""
    import json

    import yaml

    from moss_train.commands import pack as pack_command
    from moss_train.config.schema import PackConfig

    root = Path(__file__).parents[2]
    sounds = root / "recipes" / "quickstart" / "audio" / "sound"
    folder.mkdir()
    for path in sorted(sounds.glob("drum_*.flac"))[:3]:
        shutil.copy(path, folder)
    config = yaml.safe_load((root / "configs" / "pack.yaml").read_text())
    config |= {"input": str(folder), "domain": "sound", "out": str(folder / "packed"), "num_workers": 1}
    assert pack_command.run(PackConfig.parse(config)) == 0
    assert len(json.loads((folder / "packed" / "index.json").read_text())["shards"]) == 1
    return folder / "packed"
