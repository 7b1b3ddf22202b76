"""The wheel and the checkout: what is installed in either way."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moss_train.utils.files import config_directory

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def relative_files(folder, pattern):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


@pytest.mark.processes
def test_wheel_contains_every_module(wheel_names):
    modules = relative_files("moss_train", "*.py")
    assert "moss_train/commands/doctor.py" in modules
    assert modules <= wheel_names


@pytest.mark.processes
def test_wheel_contains_every_config_inside_the_package(wheel_names):
    configs = {f"moss_train/{name}" for name in relative_files("configs", "*.yaml")}
    assert "moss_train/configs/doctor.yaml" in configs
    assert configs <= wheel_names


@pytest.mark.processes
def test_wheel_contains_nothing_else(wheel_names):
    others = {name for name in wheel_names if not name.startswith("moss_train")}
    assert others == set()
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_configs_of_the_checkout_are_found():
    assert (config_directory() / "doctor.yaml").is_file()


@pytest.mark.processes
def test_public_classes_are_imported_on_first_use_only():
    program = (
        "import sys, moss_train; "
        "assert 'torch' not in sys.modules; "
        "assert not hasattr(moss_train, 'no_such_name'); "
        "assert moss_train.MossAudioTokenizerModel.__name__ == 'MossAudioTokenizerModel'; "
        "assert moss_train.MossAudioTokenizerConfig().model_type"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_lock_names_no_registry_and_hashes_every_package():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert "--index-url" not in text
    blocks = text.replace("\\\n", " ").splitlines()
    packages = [block for block in blocks if block and not block.startswith("#")]
    assert len(packages) > 100
    assert all("==" in block and "--hash=sha256:" in block for block in packages)
