"""Parsers of foreign files under random input: they return a result or raise the documented error, nothing else."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moss_train.data.pack.manifest import list_clips, read_drop_list
from moss_train.data.pack.resume import read_journal
from moss_train.data.shards.codes import CodeShards
from moss_train.data.shards.index import ShardIndex
from moss_train.data.stream.stream import AudioStream, ClipFormat
from moss_train.export.load import load_tokenizer
from moss_train.inference.files import read_codes
from moss_train.utils.checkpoint import CHECKPOINT_FILE, MANIFEST, best_checkpoint, newest_checkpoint
from moss_train.utils.errors import UserError

from .harness import SCALE

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore:checkpoint .* is damaged")]

EXAMPLES = 30 * SCALE
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=SCALE == 1,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def edits(draw: Any, content: bytes) -> bytes:
    """Return the content with a few bytes replaced, inserted or removed."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        piece = draw(st.binary(max_size=4))
        data[place : place + draw(st.integers(0, 8))] = piece
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


@st.composite
def changes(draw: Any, tree: Any) -> Any:
    """Return plain data with one value replaced by any other, removed or added."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(tree)))
        what = draw(st.sampled_from(["change", "change", "change", "remove", "add"]))
        if what == "remove":
            return {name: value for name, value in tree.items() if name != key}
        if what == "add":
            return {**tree, draw(st.text(max_size=6)): draw(values)}
        return {**tree, key: draw(changes(tree[key]))}
    if isinstance(tree, list) and tree and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(tree) - 1))
        return [*tree[:place], draw(changes(tree[place])), *tree[place + 1 :]]
    return draw(values)


def survives(action: Callable[[], Any]) -> None:
    """Run the action; it may only raise the one error that the command line prints as one clear line."""
    with suppress(UserError):
        action()


entries = st.dictionaries(
    st.sampled_from(
        ["path", "id", "domain", "text", "task", "language", "speaker", "start_seconds", "end_seconds", "row", "x"]
    ),
    values | st.sampled_from(["a.flac", "../a.flac", "/etc/passwd", "asr", "speech", "a\0b", "\ud800"]),
    max_size=5,
)


@fuzz
@given(st.lists(entries.map(lambda entry: json.dumps(entry).encode()) | st.binary(max_size=20), max_size=4))
def test_manifests(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "a.flac").touch()
    path = tmp_path / "list.jsonl"
    path.write_bytes(b"\n".join(lines))
    survives(lambda: list_clips(path, "speech"))
    survives(lambda: read_drop_list(path))


@fuzz
@given(
    st.binary(max_size=60) | st.text(alphabet='path,id\n\r"a.flac\0', max_size=40).map(str.encode),
    st.sampled_from(["csv", "tsv"]),
)
def test_tables(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / "a.flac").touch()
    path = tmp_path / f"list.{suffix}"
    path.write_bytes(b"path,id\n" + content)
    survives(lambda: list_clips(path, "speech"))


@fuzz
@given(st.binary(max_size=60), st.binary(max_size=60), st.text(alphabet="ab 01.\n|", max_size=30))
def test_kaldi_folders(tmp_path: Path, scp: bytes, text: bytes, segments: str) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "wav.scp").write_bytes(b"a a\n" + scp)
    (tmp_path / "text").write_bytes(text)
    (tmp_path / "segments").write_text(segments)
    survives(lambda: list_clips(tmp_path, "speech"))


@pytest.fixture(scope="module")
def tiny_shards(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(packed, tmp_path_factory.mktemp("fuzz") / "packed"))


def use_shards(folder: Path) -> None:
    """Load an index, plan from it and read a few of the samples."""
    stream = AudioStream([folder], ClipFormat(24000, 1, 1920), crop_seconds=1.0)
    stream.plan_update(0, 5.0, 30.0)


@fuzz
@given(st.data())
def test_shard_indexes(tiny_shards: Path, packed: Path, data: st.DataObject) -> None:
    index = (packed / "index.json").read_bytes()
    arrays = (packed / "index.safetensors").read_bytes()
    how = data.draw(st.sampled_from(["bytes", "tree", "arrays"]))
    if how == "tree":
        index = json.dumps(data.draw(changes(json.loads(index)))).encode()
    elif how == "bytes":
        index = data.draw(edits(index))
    else:
        arrays = data.draw(edits(arrays))
    (tiny_shards / "index.json").write_bytes(index)
    (tiny_shards / "index.safetensors").write_bytes(arrays)
    survives(lambda: use_shards(tiny_shards))
    survives(lambda: ShardIndex.load(tiny_shards).verify_arrays())


CODES_INDEX = {
    "format": "moss_train codes",
    "version": 1,
    "source": {
        "model": "x",
        "fingerprint": "0",
        "num_levels": 2,
        "sampling_rate": 24000,
        "frame_rate": 12.5,
        "num_channels": 1,
        "audio_sha256": "0",
    },
    "shards": [{"file": "a.tar", "domain": "x", "num_samples": 1, "bytes": 0, "sha256": "", "seconds": 0.0}],
}


@fuzz
@given(changes(CODES_INDEX), st.binary(max_size=40))
@example(CODES_INDEX | {"shards": [None]}, b"")
def test_code_shard_indexes(tmp_path: Path, index: Any, arrays: bytes) -> None:
    (tmp_path / "a.tar").touch()
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "index.safetensors").write_bytes(arrays)
    survives(lambda: CodeShards(tmp_path))


@fuzz
@given(st.data())
def test_codes_files(tmp_path: Path, data: st.DataObject) -> None:
    header = {"codes": {"dtype": "I16", "shape": [2, 1], "data_offsets": [0, 4]}, "__metadata__": {"model": "x"}}
    text = json.dumps(data.draw(changes(header))).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(data.draw(edits(len(text).to_bytes(8, "little") + text + b"\0\0\1\0")))
    survives(lambda: read_codes(path))


@fuzz
@given(
    changes({"info": {"update": 1, "position": 2}, "files": {CHECKPOINT_FILE: {"bytes": 1, "sha256": "0"}}}),
    st.binary(max_size=30),
)
def test_run_directories(tmp_path: Path, manifest: Any, best: bytes) -> None:
    folder = tmp_path / "checkpoints" / "update-00000001"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CHECKPOINT_FILE).write_bytes(b"x")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "checkpoints" / "best.json").write_bytes(best)
    for action in (newest_checkpoint, best_checkpoint):
        survives(lambda action=action: action(tmp_path / "checkpoints"))
    survives(lambda: load_tokenizer(tmp_path))


@fuzz
@given(st.lists(values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20), max_size=4))
def test_journals_of_killed_jobs(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b"\n".join(lines))
    assert read_journal(tmp_path) == []
