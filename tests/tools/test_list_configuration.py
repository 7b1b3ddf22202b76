"""The page of all keys matches the schema and the comments."""

import runpy
from pathlib import Path

import pytest

from moss_train.config.overrides import dotted_keys
from moss_train.config.schema import COMMANDS
from moss_train.config.section import Positive

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools/list_configuration.py"))


def test_the_page_is_current():
    page = (ROOT / "recipes/guides/configuration.md").read_text("utf-8")
    assert page == TOOL["page"](), "run python tools/list_configuration.py"


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"estimate"}))
def test_every_key_of_a_command_is_on_the_page(command):
    section = TOOL["page"]().partition(f"## {command}\n")[2].partition("\n## ")[0]
    shown = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
    assert {key for key in dotted_keys(COMMANDS[command]) if not key.endswith(".0")} <= shown


def test_comments_above_beside_and_below_a_key_are_its_meaning():
    text = "# Of the file.\n# Above.\na: 1  # Beside,\n         # and below.\n\n# Lost.\n\nb:\n  c: null  # Of c.\n"
    assert TOOL["read_comments"](text) == {"a": "Above. Beside, and below.", "b.c": "Of c."}


def test_the_range_of_a_list_s_entries_is_named_once():
    assert TOOL["kind_of"](list[Positive]) == "a list of: a number above 0"
    assert TOOL["kind_of"](list[Positive] | None) == "a list of: a number above 0, or null"
