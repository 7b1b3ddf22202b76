"""The public API changes only on purpose: any difference from the committed list fails the test."""

import difflib
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / "tools/list_public_api.py"))


def test_names_commands_keys_and_columns_are_those_of_the_list():
    listed = TOOL["LIST"].read_text("utf-8").splitlines()
    found = TOOL["public_api"]().splitlines()
    changes = list(difflib.unified_diff(listed, found, "tests/public_api.txt", "code", lineterm="", n=0))
    assert not changes, "\n".join(["if it is meant, run: python tools/list_public_api.py", *changes])
