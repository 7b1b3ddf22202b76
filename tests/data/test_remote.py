"""Shards behind a local HTTP server: the same stream, a bounded cache, and a server that fails in every way."""

import functools
import hashlib
import http.server
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from moss_train.commands import pack as pack_command
from moss_train.data.shards import remote
from moss_train.data.shards.index import ShardIndex
from moss_train.data.stream.loader import make_loader
from moss_train.data.stream.stream import AudioStream, ClipFormat
from moss_train.utils.errors import UserError
from tests.data.packed_clips import iterate_clips
from tests.local_server import serving


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and fails as often as `failures` says."""

    requests: ClassVar[Counter[str]] = Counter()
    failures: ClassVar[Counter[str]] = Counter()
    kind = "error"

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.requests[name] += 1
        if self.failures[name] > 0:
            self.failures[name] -= 1
            self.fail(name)
        else:
            super().do_GET()

    def fail(self, name: str) -> None:
        if self.kind == "error":
            self.send_error(503)
            return
        content = (Path(self.directory) / name).read_bytes()
        self.send_response(200)
        content = content[:-1000] if self.kind == "short" else content[:-1] + bytes([content[-1] ^ 1])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def served(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Path(shutil.copytree(packed, tmp_path / "served"))
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    handler = type("LocalHandler", (Handler,), {"requests": Counter(), "failures": Counter(), "kind": "error"})
    with serving(functools.partial(handler, directory=str(folder))) as url:
        yield url, handler, folder


def test_a_remote_stream_is_the_local_one(packed: Path, served) -> None:
    url, handler, _ = served
    updates = [(number, 30.0) for number in range(3)]

    def read(source: str | Path, num_workers: int = 0) -> list:
        stream = AudioStream([source], ClipFormat(24000, 1, 1920), crop_seconds=0.9, max_seconds=8.0)
        loader = make_loader(
            stream, text_encoder=None, position=0, updates=updates, micro_batch_seconds=10.0, num_workers=num_workers
        )
        return list(loader)

    expected = read(packed)
    for found in (read(url), read(url, num_workers=2)):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dropped == theirs.dropped == ()
            for one, two in zip(ours.micro_batches, theirs.micro_batches, strict=True):
                assert one.sample_ids == two.sample_ids
                assert torch.equal(one.audio, two.audio)
    shards = {name: count for name, count in handler.requests.items() if name.endswith(".tar")}
    assert set(shards.values()) == {1}


def test_the_cache_stays_within_its_size(served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, _, folder = served
    sizes = sorted(path.stat().st_size for path in folder.glob("*.tar"))
    limit = sizes[-1] + sizes[-2]
    monkeypatch.setenv(remote.CACHE_GB_VARIABLE, str(limit / 1e9))
    found = []
    for name, _, _ in iterate_clips([url], sampling_rate=24000, num_channels=1):
        found.append(name)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= limit
    assert found == [name for name, _, _ in iterate_clips([folder], sampling_rate=24000, num_channels=1)]
    monkeypatch.setenv(remote.CACHE_GB_VARIABLE, str(sizes[-1] / 2e9))
    with pytest.raises(UserError, match=r"a shard has .* bytes, more than MOSS_TRAIN_CACHE_GB"):
        list(iterate_clips([url], sampling_rate=24000, num_channels=1))


def test_what_killed_processes_left_in_the_cache_is_counted_and_then_deleted(
    served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _, _ = served
    one, two = list(ShardIndex.load(url).shards)[:2]
    monkeypatch.setenv(remote.CACHE_GB_VARIABLE, str((one.bytes + two.bytes + 999) / 1e9))
    os.close(remote.open_shard(f"{url}/{one.file}", one.bytes, one.sha256))
    (kept,) = (tmp_path / "cache").rglob("*.tar")
    left = kept.with_name(f".{kept.name}.part-1")
    left.write_bytes(bytes(1000))
    os.utime(left, (time.time() - 7200,) * 2)
    growing = kept.with_name(f".{kept.name}.part-2")
    growing.write_bytes(bytes(1000))
    os.close(remote.open_shard(f"{url}/{two.file}", two.bytes, two.sha256))
    assert not left.exists()
    assert growing.exists()
    assert not kept.exists()  # there was no room beside what another process is fetching


@pytest.mark.parametrize("size", ["much", "0", "-1", "nan", "inf"])
def test_a_cache_without_a_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setenv(remote.CACHE_GB_VARIABLE, size)
    with pytest.raises(UserError, match=f"MOSS_TRAIN_CACHE_GB={size} has to be a number of gigabytes above 0"):
        remote.open_shard("http://127.0.0.1:9/x/a.tar", 10, "a" * 64)


@pytest.mark.parametrize("kind", ["error", "short", "altered"])
def test_a_failing_server_is_asked_again_and_then_given_up(served, kind: str) -> None:
    url, handler, _ = served
    handler.kind = kind
    shard, other = list(ShardIndex.load(url).shards)[:2]
    handler.failures[shard.file] = remote.ATTEMPTS - 1
    with os.fdopen(remote.open_shard(f"{url}/{shard.file}", shard.bytes, shard.sha256), "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    assert handler.requests[shard.file] == remote.ATTEMPTS
    handler.failures[other.file] = 1000
    with pytest.raises(OSError, match=rf"{other.file} after 5 attempts: "):
        remote.open_shard(f"{url}/{other.file}", other.bytes, other.sha256)
    assert handler.requests[other.file] == remote.ATTEMPTS


def test_what_is_not_there_is_one_clear_line(served) -> None:
    url, _, _ = served
    with pytest.raises(UserError, match=r"nothing is not a folder of packed shards that can be read: .*does not exist"):
        ShardIndex.load(f"{url}/nothing")


def test_the_arrays_are_fetched_once_and_again_when_the_folder_changes(served, pack_config, recordings: Path) -> None:
    url, handler, folder = served
    for _ in range(3):
        rows = len(ShardIndex.load(url))
    assert handler.requests["index.safetensors"] == 1
    assert handler.requests["index.json"] == 3
    shutil.rmtree(folder)
    assert pack_command.run(pack_config(input=recordings / "speech", out=folder, domain="speech")) == 0
    assert len(ShardIndex.load(url)) != rows
    found = [name for name, _, _ in iterate_clips([url], sampling_rate=24000, num_channels=1)]
    assert found == [name for name, _, _ in iterate_clips([folder], sampling_rate=24000, num_channels=1)]
    assert handler.requests["index.safetensors"] == 2
