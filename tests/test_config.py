"""Typed configuration: which values are accepted or refused, and the kind, path and value in the error."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moss_train import load_config
from moss_train.cli.compose import compose
from moss_train.config.fit_schema import DataConfig, FitConfig, compile_backends
from moss_train.config.old_names import REMOVED, RENAMED
from moss_train.config.overrides import dotted_keys, find_hint
from moss_train.config.recipe_schema import ObjectiveConfig, StageConfig
from moss_train.config.schema import COMMANDS, EvaluateConfig, check_inputs
from moss_train.config.section import Section, hints_of, known_keys
from moss_train.utils.errors import ConfigError
from moss_train.utils.files import config_directory

ROOT = Path(__file__).parents[1]
FIT = ["experiment=cat_1b6"]
REQUIRED = {
    "pack": ["input=i", "out=o"],
    "encode": ["model=m", "input=i", "out=o"],
    "decode": ["model=m", "input=i", "out=o"],
    "evaluate": ["model=m", "data=d", "out=o"],
    "export": ["checkpoint=c", "out=o"],
    "inspect": ["shards=s", "out=o"],
    "doctor": [],
    "fit": FIT,
    "estimate": FIT,
}


def refusal(command, *overrides):
    """Return kind, path and value of the error that a configuration raises."""
    with pytest.raises(ConfigError) as caught:
        check_inputs(load_config(command, [*REQUIRED[command], *overrides]))
    return caught.value.kind, caught.value.path, caught.value.value


@pytest.mark.parametrize(
    ("command", "override", "value"),
    [
        ("fit", "name=2024_11", "2024_11"),
        ("fit", "run_dir=2027", "2027"),
        ("fit", "data.path=2024", "2024"),
        ("fit", "data.train=2024", ["2024"]),
        ("fit", "data.train=[2024,1e3]", ["2024", "1e3"]),
        ("fit", "data.cache=007", "007"),
        ("fit", "validation.data=1.50", ["1.50"]),
        ("fit", "init=1_000", "1_000"),
        ("fit", "semantic.pretrained=2024", "2024"),
        ("fit", "semantic.text.path=1e3", "1e3"),
        ("fit", "stages.0.name=1", "1"),
        ("fit", "semantic=null", None),
        ("fit", "semantic.config.hidden_size=32", 32),
        ("fit", "discriminators.1.window_lengths=[512]", [512]),
        ("fit", "stages.0.schedule=wsd", "wsd"),
        ("fit", "stages.0.decay_fraction=0.3", 0.3),
        ("fit", "stages.1.weights.adversarial=3", 3),
        ("fit", "tokenizer.stages.0.context_duration=2", 2),
        ("fit", "tokenizer.layer_scale=0.1", 0.1),
        ("fit", "ema.decay=0.9", 0.9),
        ("fit", "objective.weights.mid_side=1", 1),
        ("fit", "data.weights={speech:0.5,music: 0.5}", {"speech": 0.5, "music": 0.5}),
        ("fit", "data.gain_db=[-6,3]", [-6, 3]),
        ("fit", "trainer.compile=true", True),
        ("fit", "trainer.compile=aot_eager", "aot_eager"),
        ("fit", "trainer.devices=2", 2),
        ("fit", "trainer.devices=auto", "auto"),
        ("fit", "+trainer.devices=2", 2),
        ("fit", "wandb=null", None),
        ("fit", "stages.0.learning_rate=1e-4", 1e-4),
        ("fit", "'name=\"a b\"'"[1:-1], "a b"),
        ("encode", "out=2025", "2025"),
        ("decode", "model=1e3", "1e3"),
        ("evaluate", "compare=1e3", ["1e3"]),
        ("encode", "device=cuda:1", ["cuda:1"]),
        ("export", "out=2026", "2026"),
        ("pack", "input=a,b", "a,b"),
        ("pack", "domain=music (live)", "music (live)"),
        ("evaluate", "report_clips=[12,a]", ["12", "a"]),
        ("evaluate", "report_clips=3", 3),
        ("estimate", "mfu=0.5", 0.5),
        ("estimate", "mfu=runs/x", "runs/x"),
    ],
)
def test_a_typed_value_arrives_as_the_type_of_its_key(command, override, value):
    found = load_config(command, [*REQUIRED[command], override]).to_plain()
    for key in override.partition("=")[0].lstrip("+").split("."):
        found = found[int(key)] if isinstance(found, list) else found[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("command", "overrides", "expected"),
    [
        ("fit", ["trainer.precision=16-mixed"], ("value", "trainer.precision", "16-mixed")),
        ("fit", ["validation.metrics=[stoi,foo]"], ("value", "validation.metrics.1", "foo")),
        ("fit", ["trainer.compile=3"], ("value", "trainer.compile", "3")),
        ("fit", ["logging.peak_tflops=0"], ("value", "logging.peak_tflops", 0)),
        ("fit", ["data.max_invalid_fraction=2"], ("value", "data.max_invalid_fraction", 2)),
        ("fit", ["trainer.compile=foo"], ("value", "trainer.compile", "foo")),
        ("fit", ["data.micro_batch_seconds=6"], ("conflict", "data.micro_batch_seconds", 6)),
        ("fit", ["data.crop_seconds=0"], ("value", "data.crop_seconds", 0)),
        ("fit", ["data.crop_seconds=inf"], ("value", "data.crop_seconds", math.inf)),
        ("fit", ["data.num_workers=-1"], ("value", "data.num_workers", -1)),
        ("fit", ["data.num_workers=1.5"], ("type", "data.num_workers", 1.5)),
        ("fit", ["data.gain_db=3"], ("type", "data.gain_db", 3)),
        ("fit", ["data.gain_db=[3,1]"], ("value", "data.gain_db", [3, 1])),
        ("fit", ["data.peak=0.5", "data.loudness_lufs=-20"], ("conflict", "data.peak", 0.5)),
        ("fit", ["data.peak=0"], ("value", "data.peak", 0)),
        ("fit", ["data.peak=1.5"], ("value", "data.peak", 1.5)),
        ("fit", ["data.loudness_lufs=3"], ("value", "data.loudness_lufs", 3)),
        ("fit", ["data.min_length_ratio=1.1"], ("value", "data.min_length_ratio", 1.1)),
        ("fit", ["data.crop_seconds=9", "data.max_seconds=8"], ("conflict", "data.crop_seconds", 9)),
        ("fit", ["data.train=a", "data.path=b"], ("conflict", "data.path", "b")),
        ("fit", ["seed=true"], ("type", "seed", True)),
        ("fit", ["seed=-1"], ("value", "seed", -1)),
        ("fit", ["checkpoint.keep_last=1"], ("value", "checkpoint.keep_last", 1)),
        ("fit", ["checkpoint.keep_every_updates=7"], ("conflict", "checkpoint.keep_every_updates", 7)),
        ("fit", ["stages.1.batch_seconds=-3"], ("value", "stages.1.batch_seconds", -3)),
        ("fit", ["stages.1.schedule=line"], ("value", "stages.1.schedule", "line")),
        ("fit", ["stages.0.trainable=[semantic]"], ("value", "stages.0.trainable", ["semantic"])),
        ("fit", ["stages.0.weights.adverserial=3"], ("unknown_key", "stages.0.weights.adverserial", 3)),
        ("fit", ["trainable=[encodr]"], ("value", "trainable.0", "encodr")),
        ("fit", ["discriminators=[]"], ("conflict", "stages.1.adversarial", True)),
        ("fit", ["ema={decay: 1}"], ("value", "ema.decay", 1)),
        ("fit", ["optimizers.generator.betas=[0.9]"], ("value", "optimizers.generator.betas", [0.9])),
        ("fit", ["stages=[]"], ("required", "stages", None)),
        ("fit", ["tokenizer=null"], ("required", "tokenizer.stages", None)),
        ("fit", ["~tokenizer.quantizer.rvq_dim"], ("required", "tokenizer.quantizer.rvq_dim", None)),
        ("fit", [], ("required", "data.train", None)),
        ("fit", ["data.train=/no/folder"], ("missing", "data.train", "/no/folder")),
        ("fit", ["data.path="], ("conflict", "data.path", "")),
        ("fit", ["data.train=[a,]"], ("conflict", "data.train.1", "")),
        ("fit", ["stages.0.weights.reconstruction=-15"], ("value", "stages.0.weights.reconstruction", -15)),
        ("fit", ["stages.0.weights.reconstruction=inf"], ("value", "stages.0.weights.reconstruction", math.inf)),
        ("pack", ["out="], ("conflict", "out", "")),
        ("fit", ["tensorboard=yes please"], ("type", "tensorboard", "yes please")),
        ("fit", ["wandb=maybe"], ("value", "wandb", "maybe")),
        ("estimate", ["gpu=h10"], ("value", "gpu", "h10")),
        ("estimate", ["gpus=0"], ("value", "gpus", 0)),
        ("pack", ["max_seconds=0.05"], ("conflict", "max_seconds", 0.05)),
        ("pack", ["max_invalid_fraction=2"], ("value", "max_invalid_fraction", 2)),
        ("encode", ["device=[cuda:0,cuda:1]"], ("conflict", "device", ["cuda:0", "cuda:1"])),
        ("encode", ["shards=s"], ("conflict", "shards", "s")),
        ("encode", ["format=mp3"], ("value", "format", "mp3")),
        ("evaluate", ["codec=mimi"], ("conflict", "codec", "mimi")),
        ("evaluate", ["weights=w"], ("conflict", "weights", "w")),
        ("evaluate", ["metrics=[pseq]"], ("value", "metrics.0", "pseq")),
        ("evaluate", ["codec=foo", "model=null"], ("value", "codec", "foo")),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(command, overrides, expected):
    assert refusal(command, *overrides) == expected


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("stages.1.shedule", "did you mean stages.1.schedule?"),
        ("tokenizer.stages.0.dmodel", "did you mean tokenizer.stages.0.d_model?"),
        ("crop_seconds", "did you mean data.crop_seconds?"),
        ("callbacks.0", "callbacks is an empty list"),
        ("stages.²", "the keys of stages are 0"),
        ("warmup_updates", "did you mean stages.0.warmup_updates?"),
        ("gain_db", "did you mean data.gain_db?"),
        ("objetive.weights.semantic", "did you mean objective.weights.semantic?"),
    ],
)
def test_an_unknown_key_names_the_nearest_one_with_its_path(key, hint):
    with pytest.raises(ConfigError) as caught:
        load_config("fit", [*FIT, f"{key}=3"])
    assert (caught.value.kind, caught.value.path) == ("unknown_key", key)
    assert caught.value.expected.startswith(hint) or key == "crop_seconds"


def test_a_key_of_a_file_is_checked_like_one_that_is_typed(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [cat_tiny, _self_]\ndata: {crop_secnds: 3}\n"
    (tmp_path / "experiment/mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config("fit", ["experiment=mine"], tmp_path)
    assert (caught.value.kind, caught.value.path) == ("unknown_key", "data.crop_secnds")


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_yaml_and_schema_have_the_same_keys_and_defaults(command):
    written = yaml.safe_load((config_directory() / f"{command}.yaml").read_text("utf-8"))
    written.pop("defaults", None)
    schema = COMMANDS[command]
    own = [key for key in dotted_keys(schema) if find_hint(COMMANDS["fit"], key) is None or command != "estimate"]
    parts = [key.split(".") for key, _ in leaves(written)]
    shown = {".".join(names[:count]) for names in parts for count in range(1, len(names) + 1)}
    sections = {key for key in own if any(name.startswith(f"{key}.") for name in own)}
    optional = ("tokenizer.", "ema.", "stages.")  # null or empty in the file
    assert {key for key in own if not key.startswith(optional)} - shown - sections == set()
    required = {name: "" for name in hints_of(schema) if written.get(name) == "???" or name == "run_dir"}
    given = {key: value for key, value in required.items() if command != "evaluate"}
    defaults = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in written.items():
        if key in given or value == "???":
            continue
        field = defaults[key]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        default = default.to_plain() if isinstance(default, Section) else default
        as_list = isinstance(default, list) and not isinstance(value, list)
        assert default == ([value] if as_list else value), key


def test_a_section_of_python_checks_itself():
    config = load_config("fit", FIT)
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, train=["a"]))
    assert (config.data.train, changed.data.train) == ([], ["a"])
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config.data, crop_seconds=-1)
    assert (caught.value.path, caught.value.value) == ("crop_seconds", -1)
    with pytest.raises(ConfigError) as caught:
        DataConfig.parse({"train": 3}, "data")
    assert (caught.value.kind, caught.value.path) == ("type", "data.train")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3


def test_plain_data_makes_the_same_configuration_again():
    config = load_config("fit", [*FIT, "ema.decay=0.9", "data.train=a"])
    assert FitConfig.parse(yaml.safe_load(yaml.safe_dump(config.to_plain()))) == config


def test_what_a_run_stored_is_read_without_the_keys_that_are_gone():
    stored = {"name": "s", "updates": 1, "batch_seconds": 2.0, "gone": 3}
    assert known_keys(StageConfig, stored) == {"name": "s", "updates": 1, "batch_seconds": 2.0}
    assert known_keys(FitConfig, {"stages": [stored], "gone": 1}) == {"stages": [known_keys(StageConfig, stored)]}


def test_backends_of_torch_compile_are_known_without_torch():
    import torch

    public = torch._dynamo.list_backends()
    assert set(public) <= set(compile_backends())


REFUSED = """
import json, sys, time
from moss_train.cli.main import main
statuses = [main(["fit", "experiment=cat_1b6", override]) for override in sys.argv[1:]]
heavy = {"torch", "lightning", "transformers"} & set(sys.modules)
print(json.dumps([statuses, time.process_time(), sorted(heavy)]))
"""


@pytest.mark.processes
def test_a_refusal_takes_two_seconds_of_processor_time_and_leaves_nothing(tmp_path):
    overrides = ["trainer.precision=16-mixed", "trainer.compile=foo", "data.micro_batch_seconds=1", "seed=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REFUSED, *overrides]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    statuses, seconds, heavy = json.loads(done.stdout)
    assert (statuses, heavy) == ([2] * 4, [])
    assert seconds < 4.0  # for four commands; the first one includes the imports
    assert list(tmp_path.iterdir()) == []


OLD_NAMES = [
    ("fit", "train=[decoder]", "trainable"),
    ("fit", "stages.0.train=[decoder]", "stages.0.trainable"),
    ("fit", "stages.0.decay_share=0.3", "stages.0.decay_fraction"),
    ("fit", "allow_changes=true", "allow_config_changes"),
    ("fit", "stop_at_update=3", "max_updates"),
    ("fit", "fresh_warmup_updates=3", "new_module_warmup_updates"),
    ("fit", "data.heldout_share=0.3", "data.heldout_fraction"),
    ("fit", "data.max_bad_share=0.3", "data.max_invalid_fraction"),
    ("fit", "objective.crop_seconds=0.3", "objective.discriminator_crop_seconds"),
    ("fit", "logging.gradient_shares_every_updates=3", "logging.log_gradient_shares_every"),
    ("fit", "validation.levels=[2]", "validation.num_quantizers"),
    ("fit", "health.grace_updates=3", "health.ignore_first_updates"),
    ("fit", "checkpoint.keep=3", "checkpoint.keep_last"),
    ("fit", "checkpoint.archive_every_updates=3000", "checkpoint.keep_every_updates"),
    ("fit", "checkpoint.best=null", "checkpoint.monitor"),
    ("estimate", "train=[decoder]", "trainable"),
    ("estimate", "text_share=0.5", "text_fraction"),
    ("estimate", "bus_gb_per_second=3", "allreduce_gb_per_second"),
    ("evaluate", "workers=3", "num_workers"),
    ("evaluate", "failures=official", "missing_values"),
    ("export", "which=best", "select"),
    ("inspect", "clipped_share=0.5", "clipped_fraction"),
    ("doctor", "run_directory=here", "run_dir"),
    ("evaluate", "code=here", "code_dir"),
    ("pack", "max_bad_share=0.5", "max_invalid_fraction"),
]


@pytest.mark.parametrize(("command", "override", "new"), OLD_NAMES)
def test_an_old_key_is_read_and_one_line_names_the_new_one(command, override, new, capsys):
    old, _, text = override.partition("=")
    given = ["codec=mimo", "data=d", "out=o"] if old == "code" else REQUIRED[command]
    assert load_config(command, [*given, override]) == load_config(command, [*given, f"{new}={text}"])
    assert load_config(command, [*given, override]) != load_config(command, given)
    assert capsys.readouterr().err.splitlines() == [f"moss_train: {old} is now called {new}"] * 2


def test_every_renamed_key_is_tried():
    tried = {override.partition("=")[0].rpartition(".")[2] for _, override, _ in OLD_NAMES}
    assert {old for names in RENAMED.values() for old in names} == tried


def test_replace_reads_keys_as_parse_does():
    config = load_config("fit", FIT)
    assert config.checkpoint.replace(keep=7) == config.checkpoint.replace(keep_last=7) != config.checkpoint
    assert config.replace(checkpoint={"keep": 7}).checkpoint.keep_last == 7
    assert config.replace() == config
    for change, expected in ({"keep_lats": 7}, "did you mean keep_last?"), ({"keep_last": -1}, "at least 2"):
        with pytest.raises(ConfigError) as caught:
            config.checkpoint.replace(**change)
        assert caught.value.path in change
        assert expected in caught.value.expected


def test_a_removed_key_is_left_out_with_the_reason(capsys):
    required = REQUIRED["evaluate"]
    assert load_config("evaluate", [*required, "speaker=ge2e"]) == load_config("evaluate", required)
    assert REMOVED["EvaluateConfig"]["speaker"] in capsys.readouterr().err
    assert EvaluateConfig.parse({"model": "m", "data": ["d"], "out": "o", "blind": True}).model == "m"


def test_an_old_key_in_a_file_of_ones_own_counts_more_than_the_shipped_default(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults: [cat_tiny, _self_]\ntrain: [quantizer, decoder]\ncheckpoint: {keep: 7}\n"
    (tmp_path / "experiment/mine.yaml").write_text(text)
    config = load_config("fit", ["experiment=mine"], tmp_path)
    assert (config.trainable, config.checkpoint.keep_last) == (["quantizer", "decoder"], 7)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_stored_configuration_of_an_older_run_is_that_of_todays_keys():
    stored = yaml.safe_load((ROOT / "tests/config/older_run.yaml").read_text("utf-8"))
    begun = FitConfig.parse(known_keys(FitConfig, stored))
    assert (begun.max_updates, begun.checkpoint.keep_last) == (5, 3)
    assert (begun.objective.discriminator_crop_seconds, begun.logging.log_gradient_shares_every) == (0.12, 2)
    assert begun.stages[1].trainable == ["decoder"]
    assert begun.objective.losses == ObjectiveConfig().losses
    assert FitConfig.parse(begun.to_plain()) == begun


def test_composing_leaves_required_values_open():
    assert compose("pack")["input"] == "???"


@pytest.mark.parametrize(
    ("experiment", "overrides", "keys"),
    [
        ("cat_tiny", ["objective.weights.adversarial=5"], "stages.2.weights.adversarial"),  # the others have none
        ("cat_tiny", ["objective.weights={feature: 5}"], "stages.2.weights.feature"),
        ("cat_tiny", ["objective.weights.codebook=2", "stages.0.weights.codebook=1"], None),  # the other stages use it
        ("cat_tiny", ["stages.2.weights.adversarial=1"], None),
        (
            "cat_1b6",
            ["objective.weights.codebook=2", "stages.0.weights.codebook=1", "stages.1.weights.codebook=1"],
            "stages.0.weights.codebook, stages.1.weights.codebook",
        ),
        ("cat_1b6", ["objective.weights.adversarial=5"], None),
        ("cat_tiny", ["objective.weights.codebook=2", "stages.0.weights=3"], None),  # refused by a later check
    ],
)
def test_a_typed_weight_that_every_stage_overrides_is_said_to_have_no_effect(experiment, overrides, keys, capsys):
    compose("fit", [f"experiment={experiment}", *overrides])
    term = overrides[0].partition("weights")[2].strip(".={").split("=")[0].split(":")[0]
    line = f"moss_train: objective.weights.{term} has no effect: set {keys}\n"
    assert capsys.readouterr().err == ("" if keys is None else line)
