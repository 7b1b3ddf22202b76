"""Checkpoints that a thread writes while training continues."""

import threading

import pytest
import torch

from moss_train.training.callbacks.checkpoint import DirectoryCheckpointIO
from moss_train.utils.checkpoint import read_payload

from ..faults.harness import assert_equal


def checkpoint(value: float) -> dict:
    return {"progress": {"update": 1, "position": 2}, "state_dict": {"w": torch.full((3,), value)}, "more": [1, (2.0,)]}


@pytest.mark.parametrize("has_gpu", [False, True])
def test_what_is_written_is_the_state_when_it_was_saved(tmp_path, monkeypatch, has_gpu):
    """Also that of a run on the CPU of a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    writer, gate = DirectoryCheckpointIO(background=True), threading.Event()
    writer._threads.submit(gate.wait)
    content = checkpoint(1.0)
    writer.save_checkpoint(content, tmp_path / "update-00000001")
    content["state_dict"]["w"].fill_(2.0)
    assert not (tmp_path / "update-00000001").exists()
    gate.set()
    writer.save_checkpoint(content, tmp_path / "update-00000002")  # waits for the previous write
    assert_equal(read_payload(tmp_path / "update-00000001"), checkpoint(1.0))
    writer.finish()
    assert_equal(read_payload(tmp_path / "update-00000002"), checkpoint(2.0))


def test_what_could_not_be_written_comes_up_once(tmp_path):
    (tmp_path / "file").touch()
    writer = DirectoryCheckpointIO(background=True)
    writer.save_checkpoint(checkpoint(1.0), tmp_path / "file" / "update-00000001")
    with pytest.raises(OSError, match="update-00000001"):
        writer.finish()
    writer.finish()
