"""The package layout stays within its limits; `tools/measure_tree.py` prints the numbers."""

import re
import sys
from pathlib import Path

import pytest

from tools import measure_tree


def test_the_layout_keeps_what_it_promises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_tree.py"])
    measure_tree.main()
    shown = capsys.readouterr().out
    figures = {
        name: int(re.search(rf"^{name} +(\d+)", shown, re.MULTILINE)[1]) for name in ("modules", "largest folder")
    }
    assert figures["modules"] <= 130
    assert figures["largest folder"] <= 14
    assert "circles of imports   0" in shown
    assert "raw look-ups         0" in shown


def test_a_raw_lookup_is_found(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training/run.py").write_text('a = 1\nrate = config["stages"]\n')
    assert measure_tree.raw_lookups(tmp_path) == ["training/run.py:2"]
