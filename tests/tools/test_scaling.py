"""The scaling law: sizes of one family, the fit, and finished runs that are not repeated."""

import argparse
import json
from pathlib import Path

import pytest

from moss_train import load_config
from moss_train.config.fit_schema import FitConfig
from moss_train.training.module import CatModule
from moss_train.training.run.warm_start import plan_initialization
from tools import scaling


@pytest.fixture
def config(packed: Path) -> FitConfig:
    overrides = ["semantic=null", "stages=[{name: only, updates: 4, batch_seconds: 1.92, learning_rate: 1e-3}]"]
    return load_config("fit", ["experiment=cat_tiny", f"data.train={packed}", "discriminators=[]", *overrides])


@pytest.mark.parametrize(("scale", "parameters"), [(0.5, 1_444_416), (1.0, 5_440_128), (1.5, 12_057_280)])
def test_every_size_is_the_experiment_with_wider_stages_and_no_projection_more(config, scale, parameters):
    settings = scaling.scaled(config, scale, 100, rate=0.5)
    tokenizer = CatModule(**plan_initialization(settings).arguments).tokenizer
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == parameters
    assert (settings.stages[0].updates, settings.stages[0].learning_rate) == (100, 5e-4)


def test_the_law_of_points_that_follow_one_is_found():
    points = [{"flops": flops, "mel_distance": 40 * flops**-0.1} for flops in (1e12, 3e12, 2e13)]
    law = scaling.fit_power_law(points)
    assert law["coefficient"] == pytest.approx(40)
    assert law["exponent"] == pytest.approx(-0.1)
    assert law["r_squared"] == pytest.approx(1)
    assert scaling.predict(law, 1e14) == pytest.approx(40 * 1e14**-0.1)


def test_the_best_rate_of_the_first_seed_is_used_with_the_others_and_nothing_is_trained_twice(
    config, packed, tmp_path, monkeypatch
):
    options = argparse.Namespace(
        experiment="cat_tiny", overrides=[], train=[str(packed)], heldout=str(packed), clips=2, longest_seconds=1.0,
        updates=2, rate_exponent=0.0, rates=[0.1, 1.0], seeds=[0, 1], out=tmp_path,
    )  # fmt: skip
    point = scaling.measure(config, 0.25, options)
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    best = min(runs[:2], key=lambda run: run["mel_distance"])
    assert [(run["rate"], run["seed"]) for run in runs] == [(0.1, 0), (1.0, 0), (best["rate"], 1)]
    assert point["mel_distance_by_seed"] == [best["mel_distance"], runs[2]["mel_distance"]]
    assert point["mel_distance"] == pytest.approx(sum(point["mel_distance_by_seed"]) / 2)

    def trained_again(*arguments: object) -> None:
        raise AssertionError("a run that is there was done again")

    monkeypatch.setattr(scaling, "train_in_memory", trained_again)
    assert scaling.measure(config, 0.25, options) == point
