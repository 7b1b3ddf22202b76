"""A run from an older version continues: its keys, tensors, optimizer states and position are read unchanged.

`older_run/` holds such a run after nine of its twelve updates, and the twelve rows written by the older version itself.
"""

import lzma
from pathlib import Path

import pytest
import yaml

from moss_train import fit
from moss_train.config.fit_schema import FitConfig
from moss_train.config.old_names import RENAMED_COLUMNS
from moss_train.config.section import known_keys
from moss_train.training.callbacks.metrics import CLOCK_COLUMNS
from moss_train.training.loggers.base import read_table
from moss_train.utils.checkpoint import list_checkpoints

from .runs import column

OLDER = Path(__file__).with_name("older_run")


@pytest.fixture
def run(packed: Path, tmp_path: Path) -> Path:
    """Copy the run directory, and let it refer to the shards of these tests."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "update-00000009"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.ckpt").write_bytes(lzma.decompress((OLDER / "checkpoint.ckpt.xz").read_bytes()))
    (checkpoint / "manifest.json").write_bytes((OLDER / "manifest.json").read_bytes())
    (run / "metrics.csv").write_bytes((OLDER / "metrics.csv").read_bytes())
    config = yaml.safe_load((OLDER / "config.yaml").read_text("utf-8"))
    config["run_dir"], config["data"]["train"] = str(run), str(packed)
    (run / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    return run


def test_a_run_of_an_older_version_goes_on_as_it_would_have_there(run: Path) -> None:
    stored = yaml.safe_load((run / "config.yaml").read_text("utf-8")) | {"stop_at_update": None}
    expected = read_table(OLDER / "metrics.csv")
    assert fit(FitConfig.parse(known_keys(FitConfig, stored))).directory == run
    found = read_table(run / "metrics.csv")
    assert [row["update"] for row in found] == [row["update"] for row in expected] == list(map(str, range(1, 13)))
    assert list_checkpoints(run / "checkpoints")[-1].name == "update-00000012"
    header = set((run / "metrics.csv").read_text("utf-8").splitlines()[0].split(","))
    assert {"discriminator_score/real", "callback_seconds"} < header
    assert not header & RENAMED_COLUMNS.keys()
    compared = [name for name in expected[-1] if name not in (*CLOCK_COLUMNS, "stage") and expected[-1][name]]
    assert len(compared) > 20
    for name in compared:
        assert column(found, name) == pytest.approx(column(expected, name), rel=1e-3), name
