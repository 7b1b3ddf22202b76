"""Every command in the READMEs composes, and every recipe prints its usage."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moss_train import load_config

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("recipes/*/README.md")),
    # extend.md needs the user's own package; tests/training/test_extend.py runs its commands.
    *sorted(page for page in ROOT.glob("recipes/guides/*.md") if page.stem != "extend"),
    ROOT / "recipes/BENCHMARKS.md",
]


def commands() -> Iterator[tuple[str, str]]:
    """Yield page and command line of every call of the program in a shell block."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(r"-m moss_train (\w.*)", line):
                    yield page.relative_to(ROOT).as_posix(), match[1]


def words(line: str) -> list[str]:
    """Return the words of a line as the shell would split them, with its quotes, braces and comments."""
    done = subprocess.run(["bash", "-fc", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_a_command_of_a_page_composes(page: str, line: str) -> None:
    command, *overrides = words(line)
    if command != "doctor" or overrides:
        assert load_config(command, overrides)


def test_there_are_commands_to_test() -> None:
    assert {line.split()[0] for _, line in commands()} >= {"pack", "fit", "export", "encode", "decode", "evaluate"}


@pytest.mark.parametrize("script", sorted(ROOT.glob("recipes/*/run.sh")), ids=lambda path: path.parent.name)
def test_a_recipe_explains_itself(script: Path) -> None:
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.startswith("# ")
    assert f"recipes/{script.parent.name}/run.sh" in script.read_text() or script.parent.name == "quickstart"
