"""Exports in the versions of transformers that dependent projects pin, each in its own environment."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moss_train.cli.main import main
from moss_train.export.write import known_audio
from moss_train.model import MossAudioTokenizerModel

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
PINNED = ("4.57.1", "5.0.0")  # required by MOSS-TTS-Nano and MOSS-TTS
REVISION = "0" * 40


def lower_bound() -> str:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(re.sub(r"transformers>=(\d+\.\d+)$", r"\1.0", name) for name in declared if "transformers" in name)


def environment(name: str, *packages: str) -> Path:
    """Create an environment with some packages and return its Python; all other packages come from the current one."""
    folder = Path(sys.prefix) / "transformers" / name
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True)
    site = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (site / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [uv, "pip", "install", "-q", "--python", python, *packages]
    limits = {"UV_HTTP_TIMEOUT": "60", "UV_HTTP_RETRIES": "0"}
    try:
        subprocess.run(command, env=os.environ | limits, check=True, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{name}: cannot be installed within 300 s")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{name}: cannot be installed: {error.stderr.strip().splitlines()[-1]}")
    (folder / "complete").touch()
    return python


def with_transformers(version: str) -> Path:
    requirement = "transformers" if version == "newest" else f"transformers=={version}"
    return environment(version, requirement, "numpy", "safetensors")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Export a small model, with expected results, and also in the layout of the hub's cache."""
    home = tmp_path_factory.mktemp("export")
    folder = home / "my-tokenizer"
    assert main(["export", f"checkpoint={ROOT / 'recipes' / 'cat_mini'}", f"out={folder}", "licence=cc0-1.0"]) == 0
    model = MossAudioTokenizerModel.from_pretrained(folder).eval()
    audio = known_audio(24000, 1, 4.0)[:1].float()
    codes = model.encode(audio).audio_codes
    decoded = model.decode(codes).audio
    save_file({"audio": audio, "codes": codes, "decoded": decoded.contiguous()}, home / "expected.safetensors")
    repository = home / "hub" / "models--owner--my-tokenizer"
    snapshot = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / path.relative_to(folder).as_posix().replace("/", "-")
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return home


def use(python: Path, script: str, exported: Path, tmp_path: Path, *arguments: str | Path) -> str:
    """Run a script of this folder in an environment and return the last word of its output."""
    variables = {
        "HF_HUB_CACHE": str(exported / "hub"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # the same as here: other partial sums are rounded differently
        "PATH": "",
    }
    command = [python, Path(__file__).with_name(script), exported / "my-tokenizer", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout.split()[-1]


def version_used(version: str, exported: Path, tmp_path: Path) -> str:
    arguments = ["owner/my-tokenizer", exported / "expected.safetensors", tmp_path / "saved"]
    return use(with_transformers(version), "stranger.py", exported, tmp_path, *arguments)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", [PINNED[0], pytest.param(PINNED[1], marks=pytest.mark.nightly)])
def test_an_export_works_in_the_versions_that_users_pin(version, exported, tmp_path):
    assert version_used(version, exported, tmp_path) == version


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", [lower_bound(), importlib.metadata.version("transformers"), "newest"])
def test_an_export_works_in_later_versions(version, exported, tmp_path):
    assert version in (version_used(version, exported, tmp_path), "newest")


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_weights_of_an_export_may_stay_on_disk(exported, tmp_path):
    """Install without dependencies: accelerate depends on torch, which comes from the current environment."""
    python = environment("accelerate", "--no-deps", "accelerate", "psutil")
    places = use(python, "offloaded.py", exported, tmp_path, exported / "expected.safetensors", tmp_path / "offload")
    assert places == "cpu,disk"
