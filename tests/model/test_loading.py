"""Folders in the released layout: strict loading, older names, shards, precision, and use without the package."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from moss_train.model import MossAudioTokenizerModel

from ..local_server import serving
from .small_models import relative_error, small_model

TINY = Path(__file__).parents[1] / "data" / "parity" / "tiny24k"


@pytest.fixture
def folder(tmp_path):
    """Copy a folder in the released layout, so that a test may change it."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def older_name(name):
    name = name.replace("self_attn.in_projs.0.weight", "self_attn.in_proj_weight")
    return name.replace("self_attn.out_projs.0.weight", "self_attn.out_proj.weight")


def test_names_and_shapes_are_the_released_ones():
    """The folder is passed by the argument name that transformers uses."""
    released = load_file(TINY / "model.safetensors")
    ours = MossAudioTokenizerModel.from_pretrained(pretrained_model_name_or_path=TINY).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in released.items()}
    assert all(torch.equal(ours[name], released[name]) for name in released)


@pytest.mark.parametrize(
    "lost", ["encoder.1.transformer.layers.0.norm1.bias", "quantizer.quantizers.3.codebook.weight"]
)
def test_missing_weight_is_refused(folder, lost):
    change_weights(folder, lambda weights: {name: value for name, value in weights.items() if name != lost})
    with pytest.raises(ValueError, match=f"missing_keys: {lost}"):
        MossAudioTokenizerModel.from_pretrained(folder)


def test_left_over_weight_is_refused(folder):
    change_weights(folder, lambda weights: {**weights, "encoder.1.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unexpected_keys: encoder\.1\.extra"):
        MossAudioTokenizerModel.from_pretrained(folder)


def test_weight_of_another_shape_is_refused(folder):
    name = "encoder.1.input_proj.weight"
    change_weights(folder, lambda weights: {**weights, name: weights[name][:-1].clone()})
    with pytest.raises((ValueError, RuntimeError), match=r"input_proj|mismatch"):
        MossAudioTokenizerModel.from_pretrained(folder)


def test_older_names_load_and_are_saved_under_the_new_ones(folder, tmp_path):
    released = load_file(TINY / "model.safetensors")
    change_weights(folder, lambda weights: {older_name(name): value for name, value in weights.items()})
    assert "encoder.1.transformer.layers.0.self_attn.in_proj_weight" in load_file(folder / "model.safetensors")
    model = MossAudioTokenizerModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name]) for name in released)


def test_several_weight_files(tmp_path):
    model = MossAudioTokenizerModel.from_pretrained(TINY)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded = MossAudioTokenizerModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_saved_configuration_keeps_the_released_keys(tmp_path):
    model = MossAudioTokenizerModel.from_pretrained(TINY)
    model.save_pretrained(tmp_path)
    released, saved = (json.loads((path / "config.json").read_text()) for path in (TINY, tmp_path))
    changed = {key for key in released if saved.get(key) != released[key]}
    assert changed <= {"version", "dtype"}
    assert saved["sample_rate"] == saved["sampling_rate"] == 24000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizer_stays_in_float32(dtype):
    exact = MossAudioTokenizerModel.from_pretrained(TINY)
    for model in (MossAudioTokenizerModel.from_pretrained(TINY, dtype=dtype), exact.to(dtype)):
        stages = {p.dtype for part in (model.encoder, model.decoder) for p in part.parameters()}
        assert stages == {dtype}
        assert {p.dtype for p in model.quantizer.parameters()} == {torch.float32}
    stored = load_file(TINY / "model.safetensors")
    assert all(torch.equal(v, stored[f"quantizer.{name}"]) for name, v in model.quantizer.state_dict().items())


def test_bfloat16_model_runs_and_stays_near_float32():
    exact = MossAudioTokenizerModel.from_pretrained(TINY).eval()
    rounded = MossAudioTokenizerModel.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    audio = torch.randn(2, 1, 9600, generator=torch.Generator().manual_seed(1)) * 0.1
    hidden = exact.encode(audio).encoder_hidden_states
    assert relative_error(rounded.encode(audio).encoder_hidden_states.float(), hidden) < 0.05
    codes = exact.encode(audio).audio_codes
    assert relative_error(rounded.decode(codes).audio.float(), exact.decode(codes).audio) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_half_a_model_in_half_precision_computes_as_in_the_whole(part, dtype):
    whole, half = (MossAudioTokenizerModel.from_pretrained(TINY, dtype=dtype, part=p).eval() for p in (None, part))
    assert half.dtype == whole.dtype == dtype
    audio = torch.randn(1, 1, 9600, generator=torch.Generator().manual_seed(1)) * 0.1
    codes = whole.encode(audio).audio_codes
    if part == "encoder":
        assert torch.equal(half.encode(audio).audio_codes, codes)
    else:
        assert torch.equal(half.decode(codes).audio, whole.decode(codes).audio)
        assert half.stream().decode(codes)[0].dtype == dtype


def cached_repository(cache):
    """Return the folder of the only revision of owner/name in a hub cache."""
    snapshot = cache / "models--owner--name" / "snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("subfolder", ["", "inner"])
def test_half_of_a_repository_needs_only_the_files_of_that_half(tmp_path, part, subfolder):
    """The hub cache lacks the other files, and nothing can be downloaded."""
    model = small_model()
    snapshot = cached_repository(tmp_path)
    model.save_pretrained(snapshot / subfolder, max_shard_size="8KB")
    place = {"cache_dir": tmp_path, "subfolder": subfolder}
    index = json.loads((snapshot / subfolder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.split(".")[0] in (part, "quantizer")}
    others = set(index.values()) - needed
    assert len(needed) > 1
    assert len(others) > 1
    for file in others:
        (snapshot / subfolder / file).unlink()
    half = MossAudioTokenizerModel.from_pretrained("owner/name", part=part, **place)
    expected = {name: value for name, value in model.state_dict().items() if name.split(".")[0] in (part, "quantizer")}
    assert half.state_dict().keys() == expected.keys()
    assert all(torch.equal(half.state_dict()[name], value) for name, value in expected.items())
    assert half.name_or_path == half.config.name_or_path == "owner/name"
    (snapshot / subfolder / sorted(needed)[0]).unlink()
    with pytest.raises(OSError, match="in the cached files"):
        MossAudioTokenizerModel.from_pretrained("owner/name", part=part, **place)


class Repository(http.server.BaseHTTPRequestHandler):
    """A stand-in for hub downloads: every repository contains the files of `folder`."""

    folder = Path()
    fetched: ClassVar[list[str]] = []

    def do_GET(self):
        path = self.path.partition("/resolve/")[2].partition("/")[2]
        file = self.folder / path
        found = bool(path) and file.is_file()
        content = file.read_bytes() if found else b""
        if self.path.startswith("/api/models/owner/name"):  # needed to find weights in several files
            found, content = True, self.description().encode()
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "1" * 40)
        if found:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET" and found:
            if path:
                self.fetched.append(path)
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def description(self):
        files = [(path.name, path.stat().st_size) for path in self.folder.iterdir()]
        if "/tree/" in self.path:
            return json.dumps([{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in files])
        siblings = [{"rfilename": name} for name, _ in files]
        return json.dumps({"id": "owner/name", "sha": "1" * 40, "siblings": siblings})

    def log_message(self, *arguments):
        pass


OTHER_HALF = """
import os
from moss_train.export import load_tokenizer
from moss_train.model import MossAudioTokenizerModel
from moss_train.utils.errors import UserError

assert load_tokenizer("owner/name", part="encoder").part == "encoder"
print("half", flush=True)
input()
try:
    MossAudioTokenizerModel.from_pretrained("owner/name", local_files_only=True)
except OSError as error:
    print(error, flush=True)
os.environ["HF_HUB_OFFLINE"] = "1"
from moss_train.utils.hub import hub_problem
hub_problem.cache_clear()
try:
    load_tokenizer("owner/name")
except UserError as error:
    print(error, flush=True)
del os.environ["HF_HUB_OFFLINE"]
hub_problem.cache_clear()
print(sum(value.numel() for value in load_tokenizer("owner/name").parameters()))
"""


@pytest.mark.processes
def test_a_repository_of_which_half_was_downloaded_is_completed(tmp_path):
    """Online, the missing files are downloaded; offline, the error says that they are missing."""
    model = small_model()
    model.save_pretrained(tmp_path / "repository", max_shard_size="8KB")
    weights = {path.name for path in (tmp_path / "repository").glob("*.safetensors")}
    handler = type("Handler", (Repository,), {"folder": tmp_path / "repository", "fetched": []})
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command, pipes = [sys.executable, "-c", OTHER_HALF], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with serving(handler) as url:
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
            assert process.stdout.readline() == "half\n"
            first = set(handler.fetched)
            lines = process.communicate("\n", timeout=120)[0].splitlines()
    assert process.returncode == 0
    others = weights - first
    assert weights & first
    assert len(others) > 1
    expected = f"owner/name: {', '.join(sorted(others)[:3])} ({len(others)}) cannot be fetched; the cache has the other"
    assert lines[0].startswith(expected)
    assert lines[1] == f"{lines[0]} (HF_HUB_OFFLINE is set)"
    assert lines[2] == str(sum(value.numel() for value in model.parameters()))
    assert set(handler.fetched) >= weights
    assert len(handler.fetched) == len(set(handler.fetched))


def test_an_index_of_a_repository_names_no_files_elsewhere(tmp_path):
    snapshot = cached_repository(tmp_path)
    small_model().save_pretrained(snapshot, max_shard_size="8KB")
    path = snapshot / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../outside.safetensors")
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'\.\./\.\./outside\.safetensors', which is no plain file name"):
        MossAudioTokenizerModel.from_pretrained("owner/name", part="encoder", cache_dir=tmp_path)
