"""A run that an older version began goes on: its keys, tensors, optimizer states and position are read as they are.

`older_run/` holds such a run after nine of its twelve updates, and the twelve rows that the older version itself wrote.
"""

import lzma
from pathlib import Path

import pytest

from moss_train.cli.main import main
from moss_train.training.callbacks.metrics import CLOCK_COLUMNS
from moss_train.training.loggers.base import column, read_table
from moss_train.utils.checkpoint import list_checkpoints

OLDER = Path(__file__).with_name("older_run")
SHARDS, DONE = "/packed", "update-00000009"


@pytest.fixture
def run(packed: Path, tmp_path: Path) -> Path:
    """The run directory, as if it had been begun on the shards of these tests."""
    checkpoint = tmp_path / "run" / "checkpoints" / DONE
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.ckpt").write_bytes(lzma.decompress((OLDER / "checkpoint.ckpt.xz").read_bytes()))
    (checkpoint / "manifest.json").write_bytes((OLDER / "manifest.json").read_bytes())
    (tmp_path / "run" / "metrics.csv").write_bytes((OLDER / "metrics.csv").read_bytes())
    config = (OLDER / "config.yaml").read_text("utf-8").replace(SHARDS, str(packed))
    (tmp_path / "run" / "config.yaml").write_text(config, "utf-8")
    return tmp_path / "run"


def test_a_run_of_an_older_version_goes_on_as_it_would_have_there(run: Path, packed: Path, capsys) -> None:
    overrides = (OLDER / "overrides.txt").read_text("utf-8").splitlines()
    expected = read_table(OLDER / "metrics.csv")
    assert main(["fit", *overrides, f"data.train={packed}", f"run_dir={run}"]) == 0
    assert "discriminator_crop_seconds" in capsys.readouterr().err  # the new name of a key
    found = read_table(run / "metrics.csv")
    assert [row["update"] for row in found] == [row["update"] for row in expected] == list(map(str, range(1, 13)))
    assert [path.name for path in list_checkpoints(run / "checkpoints")][-1] == "update-00000012"
    compared = [name for name in expected[-1] if name not in (*CLOCK_COLUMNS, "stage") and expected[-1][name]]
    assert len(compared) > 20
    for name in compared:
        assert column(found, name) == pytest.approx(column(expected, name), rel=1e-3), name
