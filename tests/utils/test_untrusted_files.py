"""Foreign files: sizes, depths, names and links that would cost memory, time or other files."""

import contextlib
import io
import json
import os
import pickle
import tarfile
import threading
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save

from moss_train.audio.io import write_audio
from moss_train.cli.compose import compose, load_config
from moss_train.cli.main import main
from moss_train.commands.pack import _totals_table
from moss_train.data.inspect import ClipFacts, Inspection, render_page
from moss_train.data.pack.manifest import list_clips
from moss_train.data.shards import remote
from moss_train.data.shards.codes import (
    CODE_ARRAYS,
    CodedClip,
    CodeShards,
    CodesSource,
    write_code_index,
    write_code_shard,
)
from moss_train.data.shards.format import read_shard
from moss_train.data.shards.index import ShardIndex, ShardRecord, ShardTable
from moss_train.evaluation.metrics.base import Column
from moss_train.evaluation.reconstruct import Condition
from moss_train.evaluation.report.html import write_report
from moss_train.evaluation.report.tables import Table
from moss_train.evaluation.results import ClipRow, ConditionRow, file_name
from moss_train.evaluation.statistics import ConfidenceInterval, SummaryRow
from moss_train.inference.files import Report as FilesReport
from moss_train.inference.files import print_report
from moss_train.training.callbacks.run_records import StartupMessages
from moss_train.training.run.fit import warn_of_silence
from moss_train.utils.checkpoint import read_best
from moss_train.utils.errors import ConfigError, UserError
from moss_train.utils.files import MAX_YAML_VALUES, parse_json, printable, read_json, read_yaml
from tests.malice import Malice

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, "1" * 5000, "{", "", b"\xff\xfe\xfa", b"\x00"])
def test_json_without_bottom_or_sense_is_one_error(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="not JSON that can be read"):
        read_json(path)
    with pytest.raises(UserError, match=r"^here: "):
        parse_json(content, "here")


def test_json_is_read_from_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="not a file"):
        read_json(tmp_path / "pipe.json")  # opening a pipe would block for ever
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(UserError, match="not a file of at most"):
        read_json(tmp_path / "huge.json")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (LAUGHS, f"{MAX_YAML_VALUES} values"),
        ("a: &a [*a]", "values"),
        ("a: &a {b: *a}", "values"),
        ("a: &a {x: 1}\nb: {<<: [" + ", ".join(["*a"] * 60_000) + "]}", "values"),
        ("[" * 50_000, "not plain YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not plain YAML"),
        ("x: " + "y" * 2**22, "bytes"),
    ],
)
def test_yaml_that_unfolds_without_end_is_refused(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "own" / "x.yaml"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=match):
        read_yaml(path)
    with pytest.raises(UserError, match=match):
        compose("fit", ["experiment=cat_tiny"], tmp_path / "own")


def test_aliases_as_a_person_writes_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}], "c": {"x": 1, "y": 2}}


def test_a_configuration_of_others_makes_hydra_run_nothing(tmp_path: Path) -> None:
    """Neither its callbacks, launcher or sweeper nor its own search path or package are used."""
    canary = tmp_path / "canary"
    touch = f"{{_target_: os.system, command: touch {canary}}}"
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "evil.yaml").write_text(
        f"# @package _global_\ndefaults: [cat_tiny]\nhydra:\n  callbacks: {{a: {touch}}}\n  launcher: {touch}\n"
        f"  sweeper: {touch}\n  searchpath: [pkg://os]\n  job_logging: {{handlers: {{a: {touch}}}}}\n"
    )
    with contextlib.suppress(UserError):
        compose("fit", ["experiment=evil"], tmp_path / "own")
    assert not canary.exists()


def test_a_hash_of_an_index_names_no_file_outside_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "a" / "cache"))
    evil = "../../../x/yz/" + "0" * 50
    with pytest.raises(OSError, match="is not a hash"):
        remote.open_shard("http://127.0.0.1:9/x/victim.tar", 10, evil)
    with pytest.raises(OSError, match="is not a hash"):
        remote.fetch_arrays("http://127.0.0.1:9/x", "index.safetensors", evil)
    assert list(tmp_path.iterdir()) == []
    record = ShardRecord("speech-000000.tar", "speech", 1, 1, "0" * 64, 1.0)
    assert len(ShardTable([vars(record)], tmp_path)) == 1
    for change in ({"sha256": evil}, {"sha256": "A" * 64}, {"file": "../x.tar"}, {"file": "a.tar::file:///etc/x.tar"}):
        with pytest.raises(UserError):
            ShardTable([vars(record) | change], tmp_path)


def tar_with(path: Path, members: list[tuple[str, int, bytes]]) -> Path:
    """Write a tar with arbitrary headers: (name, size, type)."""
    with path.open("wb") as file:
        for name, size, kind in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = size, kind
            file.write(info.tobuf() + bytes(512 if size else 0))
        file.write(bytes(1024))
    return path


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a.flac", 10, tarfile.REGTYPE), ("a.json", 2**40, tarfile.REGTYPE)], "more than"),
        ([("a.flac", 0, tarfile.SYMTYPE), ("a.json", 0, tarfile.REGTYPE)], "link"),
        ([("a.flac", 0, tarfile.LNKTYPE), ("a.json", 0, tarfile.REGTYPE)], "link"),
        ([("a.flac", 0, tarfile.CHRTYPE), ("a.json", 0, tarfile.REGTYPE)], "device"),
        ([("../../a.flac", 0, tarfile.REGTYPE), ("/etc/a.json", 0, tarfile.REGTYPE)], "not a <key>.flac"),
    ],
)
def test_members_of_a_tar_are_small_files_in_pairs(tmp_path: Path, members: list, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_shard(tar_with(tmp_path / "a.tar", members), 24000)


SOURCE = CodesSource("m", "f", 2, 24000, 12.5, 1, "0" * 64)


@pytest.mark.parametrize("change", [{"codes_size": 2**50}, {"json_offset": -5}, {"json_size": -1}, {"shard": 7}])
def test_codes_lie_inside_their_shards(tmp_path: Path, change: dict) -> None:
    codes = torch.zeros(2, 3, dtype=torch.int64)
    write_code_shard(tmp_path / "speech-000000.tar", [CodedClip("a", codes, {"id": "a", "num_samples": 9})])
    write_code_index(tmp_path, [("speech-000000.tar", "speech")], SOURCE)
    shards = CodeShards(tmp_path)
    assert [(key, found.shape) for key, found, _ in shards] == [("a", (2, 3))]
    arrays = {name: np.asarray(array) for name, array in shards.arrays.items()}
    arrays |= {name: np.full(1, value, CODE_ARRAYS[name]) for name, value in change.items()}
    (tmp_path / "index.safetensors").write_bytes(save({name: torch.from_numpy(a) for name, a in arrays.items()}))
    with pytest.raises(UserError, match="does not fit"):
        CodeShards(tmp_path)


def test_a_folder_to_pack_has_links_loops_pipes_and_devices(tmp_path: Path) -> None:
    """Packing ends; only files are listed, other entries are named, and targets outside are named in a warning."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    (folder / "a").mkdir(parents=True)
    other.mkdir()
    for path in (folder / "a" / "x.wav", other / "private.wav"):
        path.write_bytes(b"RIFF")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "twice").symlink_to(folder / "a")
    (folder / "self.wav").symlink_to(folder / "self.wav")
    (folder / "out").symlink_to(other)
    (folder / "zero.wav").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.wav")
    found: list = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        worker = threading.Thread(target=lambda: found.append(list_clips(folder, "speech")), daemon=True)
        worker.start()
        worker.join(20)
    assert not worker.is_alive()
    assert [clip.id for clip in found[0].clips] == ["a/x.wav", "out/private.wav"]
    assert [bad.name for bad in found[0].invalid] == ["pipe.wav", "self.wav", "zero.wav"]
    (message,) = [str(entry.message) for entry in caught]
    assert "2 links" in message
    assert str(other) in message


@pytest.mark.parametrize(
    "line", [b'{"path": "x.wav", "text": "' + b"a" * 2**23 + b'"}', b'{"path": "x.wav"' + b"[" * 9999]
)
def test_a_line_without_end_is_one_bad_line(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "x.wav").write_bytes(b"RIFF")
    (tmp_path / "m.jsonl").write_bytes(line + b'\n{"path": "x.wav", "id": "good"}\n')
    listed = list_clips(tmp_path / "m.jsonl", "speech")
    assert [clip.id for clip in listed.clips] == ["good"]
    assert [place.rpartition(":")[2] for place, *_ in listed.invalid] == ["1"]


def test_labels_that_no_reader_takes_are_not_packed(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"RIFF")
    lines = [{"path": "x.wav", "id": "a", "text": "\0" * 140_000}, {"path": "x.wav", "id": "b", "text": "\0" * 130_000}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    listed = list_clips(tmp_path / "m.jsonl", "speech")
    assert [clip.id for clip in listed.clips] == ["b"]
    assert len(json.dumps(listed.clips[0].labels())) < 2**20


def test_an_arrow_file_unpickles_nothing(tmp_path: Path) -> None:
    """pyarrow before 14.0.1 built extension types from pickles in the schema (CVE-2023-47248)."""
    arrow = pytest.importorskip("pyarrow")
    canary = tmp_path / "canary"
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Malice(canary)),
    }
    audio = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    schema = arrow.schema([arrow.field("audio", audio), arrow.field("text", arrow.string(), metadata=metadata)])
    table = arrow.table([arrow.array([{"bytes": b"x", "path": None}], audio), arrow.array(["t"])], schema=schema)
    sink = io.BytesIO()
    with arrow.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.arrow").write_bytes(sink.getvalue())
    (tmp_path / "data" / "dataset_info.json").write_text("{}")
    (tmp_path / "data" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}))
    assert [clip.text for clip in list_clips(tmp_path / "data", "speech").clips] == ["t"]
    assert not canary.exists()


@pytest.mark.parametrize("splits", [["../other"], ["/etc"], 3, None, [["a"]]])
def test_splits_are_folders_of_the_dataset(tmp_path: Path, splits: object) -> None:
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(UserError):
        list_clips(tmp_path, "speech")


def test_the_best_checkpoint_is_one_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "elsewhere").mkdir()
    best = {"name": "../elsewhere", "update": 1, "metric": "mel", "value": 1.0}
    (tmp_path / "checkpoints" / "best.json").write_text(json.dumps(best))
    assert read_best(tmp_path / "checkpoints") is None


class Elements(HTMLParser):
    """Collects elements and the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found |= {tag, *(f"{tag} {name}" for name, _ in attributes)}


EVIL = "\"><script>alert(1)</script><img src=x onerror='alert(1)'>$body</td>"


def test_names_and_texts_in_the_page_of_inspect_are_text(packed: Path) -> None:
    index = ShardIndex.load(packed)

    def page(name: str) -> str:
        clip = ClipFacts(0, name, name, 1.0, name, name, error=name)
        return render_page([Inspection(index, (name,), (clip,))], {name: name}, [(name, clip, name)], name)

    assert Elements(page(EVIL)).found == Elements(page("plain")).found


def test_names_and_texts_in_the_report_of_evaluate_are_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")

    def page(name: str, folder: Path) -> str:
        condition = Condition(name, 1, 100.0)
        row = ClipRow(name, name, "0" * 24, 1.0, (ConditionRow(condition, {"mel_loss": 1.0}, {name: name}, {}, name),))
        audio = folder / "audio" / row.key
        audio.mkdir(parents=True)
        for file in ("original", file_name(condition)):
            write_audio(audio / f"{file}.flac", torch.zeros(1, 2400), 24000)
        column = Column("mel_loss", name, False)
        summary = SummaryRow(name, condition, {"mel_loss": ConfidenceInterval(1.0, 0.9, 1.1, 1)}, 1, 0)
        table = Table(name, (column,), (summary,), {}, {}, (name,))
        write_report(folder, table, [row], [], [])
        return (folder / "report.html").read_text()

    assert Elements(page(EVIL, tmp_path / "a")).found == Elements(page("plain", tmp_path / "b")).found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[2J\x1b]0;title\x07b.wav", r"a\x1b[2J\x1b]0;title\x07b.wav"),
        ("one\rtwo\x9b31m", r"one\rtwo\x9b31m"),
        ("gpj.\u202efdp\u2028", r"gpj.\u202efdp\u2028"),
        ("Größe 你好\tand\nmore", "Größe 你好\tand\nmore"),
    ],
)
def test_what_steers_a_terminal_is_written_out(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_names_in_messages_steer_no_terminal(tmp_path: Path, capsys) -> None:
    name = "x\x1b[31m.wav"
    report = FilesReport(0, 0, [(tmp_path / name, "is not audio")])
    assert print_report(report, tmp_path / name, "encode") == 1
    warn_of_silence(tmp_path, name)
    StartupMessages([name]).on_train_start(SimpleNamespace(is_global_zero=True), None)
    assert main(["encode", "--config-dir", name]) == 2
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed
    assert printed.count("\\x1b[31m.wav") == 5


SECRETS = [
    "${oc.env:HOME}",
    "a${oc.env:HOME,b}",
    "${oc.${x}:HOME}",
    "${oc.decode:${oc.env:HOME}}",
    "${hydra:runtime.cwd}",
]


@pytest.mark.parametrize("text", [*SECRETS, "${unclosed"])
def test_a_configuration_of_others_reads_no_environment(tmp_path: Path, text: str) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    content = f"# @package _global_\ndefaults: [cat_tiny]\nx: env\nname: '{text}'\n"
    (tmp_path / "own" / "experiment" / "evil.yaml").write_text(content)
    with pytest.raises(UserError, match=r"evil\.yaml"):
        compose("fit", ["experiment=evil", "data.train=[x]"], tmp_path / "own")


def test_a_file_outside_that_a_configuration_names_reads_no_environment(tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "outside.yaml").write_text("# @package _global_\nname: ${oc.env:HOME}\n")
    content = "# @package _global_\ndefaults: [cat_tiny, ../../outside]\n"
    (tmp_path / "own" / "experiment" / "evil.yaml").write_text(content)
    with pytest.raises(UserError):
        compose("fit", ["experiment=evil", "data.train=[x]"], tmp_path / "own")


def test_links_in_a_folder_of_configurations_are_followed_and_end(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "own" / "loop").symlink_to(tmp_path / "own")
    compose("fit", ["experiment=cat_tiny"], tmp_path / "own")
    (tmp_path / "own" / "experiment").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "evil.yaml").write_text("name: ${oc.env:HOME}\n")
    with pytest.raises(UserError, match=r"evil\.yaml"):
        compose("fit", ["experiment=cat_tiny"], tmp_path / "own")


def test_references_to_other_keys_and_what_was_typed_are_resolved(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OWN_NAME", "mine")
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    content = "# @package _global_\ndefaults: [cat_tiny]\nname: x-${seed}\nseed: 7\n"
    (tmp_path / "own" / "experiment" / "good.yaml").write_text(content)
    arguments = ["experiment=good", "data.train=[x]"]
    assert load_config("fit", arguments, tmp_path / "own").name == "x-7"
    assert load_config("fit", [*arguments, "name=${oc.env:OWN_NAME}"], tmp_path / "own").name == "mine"


def test_a_configuration_of_others_names_no_code_to_run(tmp_path: Path) -> None:
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "evaluate.yaml").write_text("code: evil\n")
    with pytest.raises(UserError, match=r"evaluate\.yaml has the name of a shipped"):
        compose("evaluate", ["codec=mimo"], tmp_path / "own")
    (tmp_path / "own" / "evaluate.yaml").unlink()
    for key in ("code_dir", "plugins"):
        content = f"# @package _global_\ndefaults: [cat_tiny]\n{key}: evil\n"
        (tmp_path / "own" / "experiment" / "evil.yaml").write_text(content)
        with pytest.raises(ConfigError) as caught:
            compose("fit", ["experiment=evil"], tmp_path / "own")
        assert (caught.value.kind, caught.value.path) == ("conflict", key)


def test_a_label_is_no_markup_of_the_terminal() -> None:
    """rich interprets brackets as markup, and an unmatched closing one would be an error after hours of packing."""
    console = Console(record=True, width=200, file=io.StringIO())
    group = {"clips": 1, "with_text": 1, "hours": 0.5}
    console.print(_totals_table({"domain": {"speech": group}, "language": {"[/red]": group, "[bold]x": group}}))
    assert "[/red]" in (text := console.export_text())
    assert "[bold]x" in text
