"""The examples of recipes/guides/extend.md, taken from the page and run from a package outside the repository."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moss_train import fit, load_config
from moss_train.cli.main import main
from moss_train.config import build as build_module
from moss_train.config.schema import FitConfig
from moss_train.evaluation.metrics.registry import build_metrics
from moss_train.training.callbacks.build import build_own
from moss_train.training.loggers.base import Writer, read_table
from moss_train.utils.errors import ConfigError, UserError

from ..faults.harness import state
from .runs import column

GUIDE = Path(__file__).parents[2] / "recipes" / "guides" / "extend.md"
PLACES = ("experiment=", "data", "model=", "out=")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)


def overrides(command):
    """Return the overrides in the page's calls of a command, once each, without those of experiment, data and model."""
    calls = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [word for call in map(shlex.split, calls) if call[3] == command for word in call[4:]]
    return list(dict.fromkeys(word for word in words if not word.startswith(PLACES)))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Write `my_package` to a folder as on the page; nothing is imported or opened yet."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").write_text("\n\n".join(blocks("python")))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop("my_package", None)


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """Start every test without open packages."""
    monkeypatch.setattr(build_module, "_allowed_packages", set())


@pytest.fixture(scope="module")
def extended(package, small_overrides, recordings, tmp_path_factory):
    """Do a run with everything on the page; return its command line and directory."""
    directory = tmp_path_factory.mktemp("extended") / "run"
    words = [
        *small_overrides,
        *overrides("fit"),
        f"run_dir={directory}",
        f"validation.data={recordings / 'heldout.jsonl'}",
        "validation.max_clips=2",
        "validation.samples_clips=null",
        "callbacks.0.factor=0",
        "data.num_workers=1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "_allowed_packages", set())
        assert main(["fit", *words]) == 0
    return words, directory


@pytest.mark.slow
def test_every_example_takes_part_in_a_run(extended):
    _, directory = extended
    rows = read_table(directory / "metrics.csv")
    assert len(rows) == 8
    assert all(value > 0 for value in column(rows, "loss/level"))
    weights = state(directory)["state_dict"]
    assert any(name.endswith("layers.2.bias") and len(weights[name]) == 64 for name in weights)
    vocabulary = next(weights[name] for name in weights if name.endswith("embed_tokens.weight"))
    assert len(vocabulary) == 29  # of `Letters`
    assert all(value >= 0 for value in column(read_table(directory / "validation.csv"), "all/level_error/4"))
    spikes = [line.split() for line in (directory / "spikes.txt").read_text().splitlines()]
    assert [int(update) for update, *_ in spikes] == list(range(2, 9))
    assert all(names for _, _, *names in spikes)
    assert any("mean" in saved for saved in state(directory)["callbacks"].values())
    logged = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [row["update"] for row in logged if row["table"] == "metrics"] == list(range(1, 9))


@pytest.mark.slow
def test_without_the_plugin_one_line_asks_for_it(extended, packed, recordings, tmp_path, capsys):
    words, directory = extended
    closed_words = [word for word in words if not word.startswith("plugins")]
    heldout = recordings / "heldout.jsonl"
    commands = (
        ["fit", *closed_words],
        ["fit", *closed_words, f"run_dir={tmp_path / 'new'}"],
        ["fit", "experiment=finetune", f"init={directory}", f"data.train={packed}", f"run_dir={tmp_path / 'tuned'}"],
        ["evaluate", f"model={directory}", f"data={heldout}", f"out={tmp_path / 'report'}", "metrics=[text_model]"],
    )
    for command in commands:
        capsys.readouterr()
        assert main(command) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert "plugins=[my_package]" in message, command
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_tokenizer_needs_no_plugin(extended, tmp_path):
    _, directory = extended
    assert main(["export", f"checkpoint={directory}", f"out={tmp_path / 'model'}", "with_training_state=true"]) == 0
    assert build_module._allowed_packages == set()


@pytest.mark.slow
def test_evaluate_has_a_column_of_the_metric(extended, recordings, tmp_path):
    _, directory = extended
    words = [f"model={directory}", f"data={recordings / 'heldout.jsonl'}", f"out={tmp_path}", "max_clips=1"]
    assert main(["evaluate", *words, *overrides("evaluate"), "num_quantizers=[4]", "anchors=false"]) == 0
    assert "Level error (dB)" in (tmp_path / "table.md").read_text()


def test_the_run_counts_in_an_estimate(package, small_overrides, capsys):
    assert main(["estimate", *small_overrides, *overrides("fit"), "run_dir=none"]) == 0
    assert "discriminators" in capsys.readouterr().out


@pytest.mark.parametrize("entry", ["[my_package]", "my_package"])
def test_no_file_opens_a_package(package, tmp_path, entry):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "theirs.yaml").write_text(
        f"# @package _global_\n# Theirs.\nexperiment_name: theirs\nplugins: {entry}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config("fit", ["experiment=theirs"], tmp_path)
    assert (caught.value.kind, caught.value.path) == ("conflict", "plugins")
    with pytest.raises(ConfigError):
        load_config("fit", ["experiment=theirs", "plugins=[]"], tmp_path)
    assert build_module._allowed_packages == set()


def test_the_name_of_a_package_is_no_reference_to_a_file(package):
    with pytest.raises(ConfigError) as caught:
        load_config("fit", ["experiment=cat_tiny", "plugins=[${name}]", "name=my_package"])
    assert (caught.value.kind, caught.value.path) == ("value", "plugins")
    assert build_module._allowed_packages == set()


def test_stored_data_that_names_plugins_opens_nothing(package, small_overrides, tmp_path):
    config = load_config("fit", [*small_overrides, *overrides("fit"), f"run_dir={tmp_path / 'run'}"]).to_plain()
    assert config["plugins"] == ["my_package"]
    build_module._allowed_packages.clear()
    with pytest.raises(UserError, match=r"plugins=\[my_package\]"):
        fit(FitConfig.parse(config))
    assert build_module._allowed_packages == set()


def test_parts_of_another_kind_are_refused(package):
    build_module.allow_package("my_package")
    with pytest.raises(UserError, match="Letters"):
        build_own(SimpleNamespace(loggers=[{"_target_": "my_package.Letters"}]), "loggers", Writer)
    with pytest.raises(UserError, match="Letters is no metric"):
        build_metrics([{"_target_": "my_package.Letters"}])
    with pytest.raises(UserError, match="level_error"):
        build_metrics([{"_target_": "my_package.LevelError"}] * 2)
