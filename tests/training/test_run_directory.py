"""The page about the run directory lists exactly the files and columns that a run writes."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from moss_train.training.callbacks.run_records import SKIPPED_FILE
from moss_train.training.loggers.base import iterate_table
from moss_train.training.loggers.wandb import ID_FILE
from moss_train.training.run.fit import PACKED_FILE, PACKED_FOLDER
from moss_train.training.run.warm_start import RECORD_FILE as INIT_FILE
from moss_train.training.step.objective import Objective

PAGE = (Path(__file__).parents[2] / "recipes/guides/run_directory.md").read_text("utf-8")
FILES, *TABLES = PAGE.split("\n## ")


def first_cells(text: str) -> list[str]:
    """Return the names in the first column of all tables in a text."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def pattern(name: str) -> re.Pattern:
    """Return a pattern for a name on the page: `<...>` stands for one word, a folder for all its contents."""
    parts = re.split(r"<\w+>", name)
    return re.compile("[^/]+".join(map(re.escape, parts)) + (".+" if name.endswith("/") else ""))


def check(found: Sequence[str], named: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Assert that every found name is on the page, and that every name on the page is found."""
    assert [name for name in found if not any(pattern(known).fullmatch(name) for known in named)] == []
    needed = [name for name in named if name not in optional]
    assert [name for name in needed if not any(map(pattern(name).fullmatch, found))] == []


def test_files(watched):
    optional = first_cells(FILES.partition("When there is something to write:")[2])
    loggers = ["wandb/", ID_FILE, "tensorboard/"]
    assert optional == ["warnings.txt", SKIPPED_FILE, INIT_FILE, f"{PACKED_FOLDER}/", PACKED_FILE, *loggers]
    found = [path.relative_to(watched).as_posix() for path in watched.rglob("*") if path.is_file()]
    check(found, first_cells(FILES), optional)


@pytest.mark.parametrize("section", TABLES, ids=lambda section: section.partition("\n")[0])
def test_columns(watched, section):
    name = section.partition("\n")[0]
    found = next(iterate_table(watched / name)).keys()
    check(list(found), first_cells(section))


def test_every_table_has_a_section(watched):
    assert sorted(path.name for path in watched.glob("*.csv")) == sorted(text.partition("\n")[0] for text in TABLES)


def test_terms():
    (paragraph,) = [text for text in PAGE.split("\n\n") if text.startswith("Terms: ")]
    assert re.findall(r"`(\w+)`", paragraph) == list(Objective(24_000).names)
