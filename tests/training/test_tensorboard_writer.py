import importlib.util

import pytest

from moss_train.training.loggers.base import TensorBoardWriter
from moss_train.utils.errors import UserError

from .runs import silent_sample


def test_scalars_audio_and_texts_can_be_read_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path / "events", every_updates=2)
    writer.start(0)
    for update in range(1, 5):
        writer.write("metrics", {"update": update, "stage": "a", "loss/generator": update / 2})
    writer.write("validation", {"update": 3, "mel_distance/4": 1.5})
    writer.show([silent_sample(tmp_path, 3)])
    writer.close()
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/generator")] == [(2, 1.0), (4, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("validation/mel_distance/4")] == [(3, 1.5)]
    assert [event.step for event in events.Audio("1-clip/levels-04")] == [3]
    assert events.Tensors("1-clip/transcripts/text_summary")


def test_without_the_package_it_is_one_clear_line(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "moss_train.training.loggers.base.find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    with pytest.raises(UserError, match="tensorboard=true needs a package: pip install tensorboard"):
        TensorBoardWriter(tmp_path, every_updates=1)
