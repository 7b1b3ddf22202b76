"""The joint training of a stereo tokenizer, logged to TensorBoard."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from moss_train.audio.io import read_audio, write_audio
from moss_train.cli.main import main
from moss_train.commands import pack as pack_command
from moss_train.training import CatModule
from moss_train.training.loggers.base import read_table
from moss_train.training.run.warm_start import plan_initialization
from moss_train.utils.errors import UserError

from .runs import column


@pytest.fixture
def stereo(recordings, pack_config, tmp_path) -> Path:
    """Pack clips with one recording on the left channel and another one on the right."""
    files = sorted((recordings / "speech").glob("*.flac"))[:6]
    (tmp_path / "audio").mkdir()
    for number, (left, right) in enumerate(pairwise(files)):
        channels = [read_audio(path, num_channels=1)[0] for path in (left, right)]
        length = min(channel.shape[-1] for channel in channels)
        audio = torch.cat([channel[..., :length] for channel in channels])
        write_audio(tmp_path / "audio" / f"{number}.flac", audio, 24000)
    assert pack_command.run(pack_config(input=tmp_path / "audio", out=tmp_path / "packed", num_channels=2)) == 0
    return tmp_path / "packed"


def test_stereo_adds_a_mid_side_term_to_both_stages(small_overrides, stereo, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    short = ["stages.0.updates=1", "stages.1.updates=2", "logging.every_updates=1", "tensorboard=true"]
    assert (
        main(
            [
                "fit",
                *small_overrides,
                *short,
                "+tokenizer.number_channels=2",
                f"run_dir={run}",
                f"data.train=[{stereo}]",
            ]
        )
        == 0
    )
    rows = read_table(run / "metrics.csv")
    terms = column(rows, "loss/mid_side")
    assert len(terms) == 3
    assert min(terms) > 0
    assert column(rows, "weighted/mid_side") == terms
    total = sum(float(rows[-1][name]) for name in rows[-1] if name.startswith("weighted/") and rows[-1][name])
    assert total == pytest.approx(float(rows[-1]["loss/generator"]), rel=1e-5)
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss/mid_side")] == pytest.approx(terms)


@pytest.mark.parametrize(
    ("overrides", "weight"),
    [
        ([], 0.0),
        (["objective.weights.mid_side=0"], 0.0),
        (["+tokenizer.number_channels=2"], 1.0),
        (["+tokenizer.number_channels=2", "objective.weights.mid_side=0.5"], 0.5),
        (["+tokenizer.number_channels=2", "objective.weights.mid_side=0"], 0.0),
    ],
)
def test_its_weight_follows_the_channels_unless_it_is_given(small_config, overrides, weight):
    assert plan_initialization(small_config(*overrides)).arguments["objective"]["weights"]["mid_side"] == weight


def test_a_mono_tokenizer_cannot_have_it(small_config):
    with pytest.raises(UserError, match=r"objective\.weights\.mid_side=1\.0 needs two channels, the tokenizer has 1"):
        plan_initialization(small_config("objective.weights.mid_side=1.0"))
    with pytest.raises(UserError, match=r"stages\.1\.weights\.mid_side=0\.5 needs two channels, the tokenizer has 1"):
        plan_initialization(small_config("+stages.1.weights.mid_side=0.5"))


@pytest.mark.parametrize("channels", [1, 2])
def test_it_can_be_taken_away(small_config, channels):
    config = small_config("objective.losses.mid_side=null", f"+tokenizer.number_channels={channels}")
    assert "mid_side" not in CatModule(**plan_initialization(config).arguments).objective.names
