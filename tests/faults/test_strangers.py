"""Files from a stranger cannot execute code: a malicious example of each kind, and a canary that must not appear."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from moss_train.cli.main import main
from moss_train.export.load import load_tokenizer
from moss_train.inference.files import read_codes
from moss_train.training import CatModule
from moss_train.utils.checkpoint import CHECKPOINT_FILE, MANIFEST, describe_file
from moss_train.utils.errors import UserError

from ..malice import Malice
from .harness import Fit

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]


@pytest.fixture
def canary(tmp_path: Path):
    """Path of a file that malicious code would create; it must not exist at the end of the test."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def checkpoint_with(folder: Path, write: Any) -> Path:
    """Create a checkpoint directory with the content that `write` produces and a manifest that fits it."""
    folder.mkdir(parents=True)
    with (folder / CHECKPOINT_FILE).open("wb") as file:
        write(file)
    files = {CHECKPOINT_FILE: describe_file(folder / CHECKPOINT_FILE)}
    (folder / MANIFEST).write_text(json.dumps({"info": {"update": 1, "position": 1}, "files": files}))
    return folder


def test_the_example_is_malicious(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malice(tmp_path / "works")))
    assert (tmp_path / "works").exists()


@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_a_malicious_checkpoint_is_refused(tmp_path: Path, canary: Path, whole: Fit, kind: str) -> None:
    """By `export`, and by `fit` if it is the newest checkpoint of its run."""
    content = {"state_dict": {"x": torch.zeros(1)}, "progress": Malice(canary)}
    write = (lambda file: torch.save(content, file)) if kind == "zip" else (lambda file: pickle.dump(content, file))
    folder = checkpoint_with(tmp_path / "run" / "checkpoints" / "update-00000001", write)
    for path in (folder, tmp_path / "run"):
        with pytest.raises(UserError, match="cannot be loaded as tensors and plain data"):
            load_tokenizer(path)
    outcome = Fit(whole.launcher, tmp_path / "run", whole.overrides).run()
    assert outcome.status == 2, outcome.log
    assert "cannot be loaded as tensors and plain data" in outcome.log
    assert "Traceback" not in outcome.log


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "touch {canary}"},
        {"_target_": "subprocess.Popen", "args": ["touch", "{canary}"]},
        {"_target_": "builtins.eval", "_args_": ["open('{canary}', 'w')"]},
        {"_target_": "moss_train.cli.main.subprocess.run", "args": "touch {canary}", "shell": True},
        {"_target_": "moss_train.training.run.preemption.subprocess.run", "args": ["touch", "{canary}"]},
        {"_target_": "moss_train.training.run.preemption.requeue"},
        {"_target_": "moss_train.training.run.preemption.stop_torchrun"},
        {"_target_": "moss_train.training.run.fit.fit", "config": {"run_dir": "{canary}"}},
    ],
)
def test_hyperparameters_name_no_code_but_ours(tmp_path: Path, canary: Path, whole: Fit, node: dict) -> None:
    state = whole.state()
    node = json.loads(json.dumps(node).replace("{canary}", str(canary)))
    for name, value in (("semantic", node), ("discriminators", [node])):
        state["hyper_parameters"] = {**whole.state()["hyper_parameters"], name: value}
        torch.save(state, tmp_path / f"{name}.ckpt")
        with pytest.raises(UserError, match=r"not allowed|may name|not supported|cannot be found"):
            CatModule.load_from_checkpoint(tmp_path / f"{name}.ckpt", map_location="cpu")


def test_lightnings_instantiator_is_refused(tmp_path: Path, canary: Path, whole: Fit, monkeypatch) -> None:
    """One of Lightning's own names in the hyperparameters would import a module and call a function from it."""
    (tmp_path / "stranger.py").write_text(f"open({str(canary)!r}, 'w')\ndef build(*_): open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    state = whole.state()
    state["hyper_parameters"]["_instantiator"] = "stranger.build"
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="instantiator"):
        CatModule.load_from_checkpoint(tmp_path / "x.ckpt", map_location="cpu")


@pytest.fixture(scope="module")
def exported(whole: Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", f"checkpoint={whole.directory}", f"out={out}"]) == 0
    return out


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of an export, for manipulation."""
    target = tmp_path / "model"
    target.mkdir()
    for path in exported.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def poison_code(model: Path, canary: Path) -> None:
    for path in model.glob("*.py"):
        path.write_text(f"open({str(canary)!r}, 'w').close()\n" + path.read_text().replace("from __future__", "#"))


def test_code_in_a_model_folder_is_not_what_runs(model: Path, canary: Path) -> None:
    poison_code(model, canary)
    assert load_tokenizer(model).config.num_quantizers == 3


def test_remote_code_runs_only_when_it_is_trusted(model: Path, canary: Path, tmp_path: Path) -> None:
    poison_code(model, canary)
    script = "import sys\nfrom transformers import AutoModel\nAutoModel.from_pretrained(sys.argv[1])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script, str(model)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode != 0
    assert "trust_remote_code" in result.stderr


def test_pickled_weights_in_a_model_folder_execute_nothing(model: Path, canary: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"encoder.x": Malice(canary)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(model)


@pytest.mark.parametrize("kind", ["many tensors", "long header", "huge header", "outside", "deep header"])
def test_a_safetensors_header_that_lies_is_refused_at_once(model: Path, kind: str) -> None:
    path = model / "model.safetensors"
    if kind == "many tensors":
        save_file({**load_file(path), **{f"x.{i}": torch.zeros(1) for i in range(20_000)}}, path)
    else:
        tensor = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
        header = {"outside": json.dumps({"a": tensor}), "deep header": '{"a":' * 50_000}.get(kind, "{}")
        length = {"long header": 2**63, "huge header": 200_000_000}.get(kind, len(header))
        path.write_bytes(struct.pack("<Q", length) + header.encode())
    start = time.process_time()
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        load_tokenizer(model)
    assert time.process_time() - start < 60
    codes = model / "codes.safetensors"
    codes.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="codes"):
        read_codes(codes)


def poison_state(model: Path, canary: Path, name: str) -> None:
    """Add a training state with a node that would unpickle a second model folder."""
    second = model.parent / "second"
    second.mkdir()
    (second / "config.json").write_text((model / "config.json").read_text())
    torch.save({"x": Malice(canary)}, second / "pytorch_model.bin")
    node: Any = {
        "_target_": "moss_train.model.MossAudioTokenizerModel.from_pretrained",
        "pretrained_model_name_or_path": str(second),
        "weights_only": False,
        "use_safetensors": False,
    }
    if name == "semantic":
        node = {"_target_": "moss_train.semantic.TextLM", "pretrained": "owner/lm", "text": node}
    folder = model / "training_state"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / f"{name}.safetensors")
    record = {"node": node if name == "semantic" else [node], "file": f"{name}.safetensors", "aliases": {}}
    state = {"format": "moss_train training state", "version": 1, "networks": {name: record}}
    (folder / "networks.json").write_text(json.dumps(state))


@pytest.mark.parametrize("name", ["semantic", "discriminators"])
def test_the_training_state_of_a_model_folder_builds_only_listed_classes(
    model: Path, packed: Path, tmp_path: Path, canary: Path, name: str, capsys
) -> None:
    """Run the whole command: an earlier version unpickled the weights of the other folder."""
    poison_state(model, canary, name)
    overrides = [f"init={model}", f"data.train={packed}", f"run_dir={tmp_path / 'run'}", "wandb=null"]
    assert main(["fit", "experiment=finetune", *overrides, "trainer.accelerator=cpu"]) == 2
    assert "'moss_train.model.MossAudioTokenizerModel.from_pretrained' is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["deep", "aliases", "node", "text", "huge number"])
def test_a_training_state_that_makes_no_sense_is_one_line(model: Path, packed: Path, kind: str, capsys) -> None:
    folder = model / "training_state"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, folder / "semantic.safetensors")
    node = {"_target_": "moss_train.semantic.TextLM", "config": {}, "text": {}}
    record = {"node": node, "file": "semantic.safetensors", "aliases": {}}
    record |= {"aliases": {"aliases": 3}, "node": {"node": "x"}, "text": {"node": {**node, "text": 3}}}.get(kind, {})
    state = {"format": "moss_train training state", "version": 1, "networks": {"semantic": record}}
    text = {"deep": "[" * 100_000, "huge number": "1" * 10_000}.get(kind, json.dumps(state))
    (folder / "networks.json").write_text(text)
    assert main(["fit", "experiment=finetune", f"init={model}", f"data.train={packed}", "wandb=null"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) < 400


EVIL_YAML = "!!python/object/apply:os.system ['touch {canary}']"


def test_yaml_builds_no_objects(tmp_path: Path, canary: Path, make_fit) -> None:
    """Neither the configuration stored in a run directory nor one in the user's own folder."""
    fit = make_fit("begun")
    fit.finish("max_updates=1")
    (fit.directory / "config.yaml").write_text(f"seed: {EVIL_YAML.format(canary=canary)}\n")
    outcome = fit.run()
    assert outcome.status == 2, outcome.log
    assert "config.yaml" in outcome.log
    assert "Traceback" not in outcome.log
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "evil.yaml").write_text(f"seed: {EVIL_YAML.format(canary=canary)}\n")
    assert main(["fit", "--config-dir", str(tmp_path / "own"), "experiment=evil"]) == 2


@pytest.mark.parametrize(
    "override", ["+x=${{oc.env:HOME}}/${{eval:1}}", "name=!!python/object/apply:os.system", "seed=$(touch {canary})"]
)
def test_overrides_run_nothing(canary: Path, override: str, capsys) -> None:
    assert main(["fit", "experiment=cat_tiny", override.format(canary=canary), "data.train=[/nowhere]"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_known_bad_versions_are_excluded_and_all_others_locked_by_hash() -> None:
    """lightning and pytorch-lightning 2.6.2 and 2.6.3 stole credentials when imported; older torch loads are unsafe."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name in ("lightning", "pytorch-lightning"):
        assert not any(wanted[name].contains(version) for version in ("2.6.2", "2.6.3"))
    assert not wanted["torch"].contains("2.9.1")  # CVE-2026-24747, and CVE-2025-32434 before
    lock = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"\n(?=[a-z0-9])", re.sub(r"^#.*\n", "", lock, flags=re.MULTILINE).strip())
    versions = {}
    for entry in entries:
        found = re.match(r"([a-z0-9._-]+)(?:\[[^]]*\])?==([^ \\]+)", entry)
        assert found, entry[:80]
        assert "--hash=sha256:" in entry, found[1]
        versions[found[1]] = found[2]
    assert all(wanted[name].contains(versions[name]) for name in ("lightning", "pytorch-lightning", "torch"))
    assert "://" not in lock


def test_stored_configurations_are_plain_data(whole: Fit) -> None:
    """Checkpoints and stored configurations contain only containers, numbers, text and tensors."""
    plain = (dict, list, tuple, str, int, float, bool, type(None), torch.Tensor)

    def check(value: Any, where: str) -> None:
        assert type(value) in plain or isinstance(value, dict), (where, type(value))
        children = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
        )
        for key, child in children:
            check(child, f"{where}.{key}")

    check(whole.state()["hyper_parameters"], "hyper_parameters")
    check(yaml.safe_load((whole.directory / "config.yaml").read_text()), "config.yaml")
