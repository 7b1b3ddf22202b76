import errno
from pathlib import Path

import pytest

from moss_train.utils.checkpoint import (
    BestCheckpoint,
    best_checkpoint,
    checkpoint_name,
    find_damage,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_best,
    read_manifest,
    record_best,
    write_checkpoint,
)
from moss_train.utils.errors import UserError


def save(directory: Path, update: int) -> Path:
    path = directory / checkpoint_name(update)
    return write_checkpoint(path, lambda folder: (folder / "weights").write_bytes(b"w" * update), {"update": update})


def test_a_checkpoint_is_read_back_and_found(tmp_path):
    save(tmp_path, 9), save(tmp_path, 10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["update-00000009", "update-00000010"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert read_manifest(newest) == {"update": 10}


DAMAGES = {
    "cut": lambda weights, manifest: weights.write_bytes(b"w"),
    "zero bytes": lambda weights, manifest: weights.write_bytes(b""),
    "flip": lambda weights, manifest: weights.write_bytes(b"wv"),
    "missing file": lambda weights, manifest: weights.unlink(),
    "dangling link": lambda weights, manifest: (weights.unlink(), weights.symlink_to("/nowhere/weights")),
    "missing manifest": lambda weights, manifest: manifest.unlink(),
    "empty manifest": lambda weights, manifest: manifest.write_bytes(b""),
    "garbage manifest": lambda weights, manifest: manifest.write_text("[1]"),
    "empty folder": lambda weights, manifest: (weights.unlink(), manifest.unlink()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_damage_is_seen_and_the_previous_one_used(tmp_path, damage):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    damage(newer / "weights", newer / "manifest.json")
    assert find_damage(newer) is not None
    assert find_damage(older) is None
    with pytest.warns(UserWarning, match="update-00000002 is damaged"):
        assert newest_checkpoint(tmp_path) == older


def test_all_damaged_is_an_error(tmp_path):
    (save(tmp_path, 1) / "weights").unlink()
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(UserError, match="all 1 checkpoints"):
        newest_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_earlier_ones_alone(tmp_path):
    save(tmp_path, 1)

    def full(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path / checkpoint_name(2), full, {})
    assert [path.name for path in tmp_path.iterdir()] == ["update-00000001"]


def test_pruning_keeps_the_newest_and_removes_interrupted_writes(tmp_path):
    for update in (1, 2, 3):
        save(tmp_path, update)
    (tmp_path / ".partial-update-00000004").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-00000002", "update-00000003"]


def test_pruning_leaves_what_is_kept_for_good(tmp_path):
    for update in range(1, 9):
        save(tmp_path, update)
    (tmp_path / "update-00000002").rename(tmp_path / "update-00000002-mine")
    prune_checkpoints(tmp_path, 2, lambda update: update % 3 == 0)
    assert [path.name[14:] for path in list_checkpoints(tmp_path)] == ["2-mine", "3", "6", "7", "8"]


def test_the_best_checkpoint_survives_pruning_until_a_better_one(tmp_path):
    for update in (1, 2, 3, 4):
        save(tmp_path, update)
    assert best_checkpoint(tmp_path) is None
    record_best(tmp_path, BestCheckpoint(checkpoint_name(1), 1, "mel_distance/32", 2.5))
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["1", "3", "4"]
    assert best_checkpoint(tmp_path) == tmp_path / "update-00000001"
    record_best(tmp_path, BestCheckpoint(checkpoint_name(1), 1, "text_nats/32", 2.5))  # from an older run
    assert read_best(tmp_path).metric == "text_lm_loss/32"
    record_best(tmp_path, BestCheckpoint(checkpoint_name(4), 4, "mel_distance/32", 2.0))
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["3", "4"]


def test_a_damaged_best_checkpoint_is_an_error_and_a_missing_one_is_none(tmp_path):
    best = save(tmp_path, 7)
    record_best(tmp_path, BestCheckpoint(best.name, 7, "mel_distance/32", 2.5))
    (best / "weights").write_bytes(b"w")
    with pytest.raises(UserError, match="update-00000007 is damaged"):
        best_checkpoint(tmp_path)
    (tmp_path / "best.json").write_text('{"name": "update-00000009", "update": 9, "metric": "m", "value": 1.0}')
    assert read_best(tmp_path) is None
    (tmp_path / "best.json").write_text('{"name"')
    assert best_checkpoint(tmp_path) is None
