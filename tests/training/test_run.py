import json
import re
import shutil
import signal

import pytest
import torch

from moss_train.cli.main import main
from moss_train.export.load import load_tokenizer
from moss_train.training import CatModule
from moss_train.training.callbacks.metrics import metric_columns
from moss_train.training.cost import hardware as resource_room
from moss_train.training.loggers.base import read_table
from moss_train.training.run.fit import diff_config, fit
from moss_train.training.step.objective import Objective
from moss_train.utils.checkpoint import CHECKPOINT_FILE, list_checkpoints

from ..faults.harness import assert_same_run, state
from .runs import column, wait_for_rows


def test_the_published_recipe_runs_through_both_stages(whole):
    rows = read_table(whole / "metrics.csv")
    assert [row["stage"] for row in rows] == ["reconstruction"] * 4 + ["adversarial"] * 4
    assert [row["loss/discriminators"] != "" for row in rows] == [False] * 4 + [True] * 4
    assert [row["loss/adversarial"] != "" for row in rows] == [False] * 5 + [True] * 3
    for name in ("reconstruction", "commitment", "codebook"):
        assert len(column(rows, f"loss/{name}")) == 8
    assert column(rows, "loss/semantic")
    expected = [0.5e-4, 1e-4, 1e-4]
    assert column(rows, "learning_rate/generator")[:3] == pytest.approx(expected)
    kept = ["update-00000004", "update-00000006", "update-00000008"]  # the end of the first stage and the newest two
    assert [path.name for path in list_checkpoints(whole / "checkpoints")] == kept


def test_a_killed_run_resumes_to_the_last_bit(launcher, whole, small_overrides, tmp_path):
    """SIGKILL in either stage, then again with a data worker: losses, weights and optimizers are bit-identical."""
    directory = tmp_path / "killed"
    for rows_before_kill in (3, 6):
        job = launcher.start("fit", *small_overrides, f"run_dir={directory}")
        wait_for_rows(directory, rows_before_kill, job)
        job.send(signal.SIGKILL)
        assert job.wait().status == -signal.SIGKILL
    assert main(["fit", *small_overrides, f"run_dir={directory}", "data.num_workers=1"]) == 0
    assert_same_run(directory, whole)
    for table in ("codebooks.csv", "audio_hours.csv"):
        assert (directory / table).read_text() == (whole / table).read_text()


def test_the_hours_of_every_domain_are_those_of_the_whole_run(whole):
    counts = state(whole)["callbacks"]["StreamWatch"]
    assert set(counts["samples"]) <= {"speech", "music", "sound"}
    seconds = sum(column(read_table(whole / "metrics.csv"), "audio_seconds"))
    assert sum(counts["samples"].values()) / 24000 == pytest.approx(seconds)


def test_a_finished_run_is_left_alone(whole, small_overrides, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "config.yaml"}
    assert main(["fit", *small_overrides, f"run_dir={whole}"]) == 0
    assert "finished at update 8 of 8" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "config.yaml"} == before


def test_a_changed_configuration_is_refused_with_its_path_and_values(whole, small_overrides, capsys):
    assert main(["fit", *small_overrides, f"run_dir={whole}", "objective.weights.semantic=3"]) == 2
    assert "objective.weights.semantic: 20.0 -> 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("discriminators.0.channels=[3, 4]", "discriminators.0.layers.0.bias: (2,) -> (3,)"),
        ("semantic=null", "semantic."),
        ("tokenizer.quantizer.num_quantizers=3", "tokenizer.quantizer.quantizers.3."),
    ],
)
def test_a_run_that_has_begun_keeps_its_networks(whole, small_overrides, capsys, change, named):
    before = (whole / "config.yaml").read_text("utf-8")
    assert main(["fit", *small_overrides, f"run_dir={whole}", change, "allow_config_changes=true"]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert f"start another run from its weights: init={whole}" in error
    assert (whole / "config.yaml").read_text("utf-8") == before
    assert main(["fit", *small_overrides, f"run_dir={whole}"]) == 0  # as the message says


def test_the_module_loads_from_its_checkpoint_alone_and_encodes_like_the_tokenizer(whole):
    path = list_checkpoints(whole / "checkpoints")[-1] / CHECKPOINT_FILE
    module = CatModule.load_from_checkpoint(path, map_location="cpu").eval()
    assert (module.update, module.position) == (8, state(whole)["progress"]["position"])
    audio = torch.randn(1, 1, 24000, generator=torch.Generator().manual_seed(0))
    codes = module.tokenizer.encode(audio).audio_codes
    tokenizer = load_tokenizer(whole)
    assert torch.equal(codes, tokenizer.encode(audio).audio_codes)
    assert torch.equal(module.tokenizer.decode(codes).audio, tokenizer.decode(codes).audio)


def test_fine_tuning_starts_from_the_given_weights(whole, small_config):
    config = small_config(f"init={whole}", "tokenizer=null", "max_updates=0")
    tuned = load_tokenizer(fit(config).directory)
    source = load_tokenizer(whole)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), source.parameters(), strict=True))


def test_a_machine_that_is_too_small_is_told_so_before_anything_is_written(packed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resource_room, "available_memory_bytes", lambda: 8 * 2**30)
    run = tmp_path / "run"
    assert main(["fit", "experiment=cat_1b6", f"data.train={packed}", f"run_dir={run}", "trainer.accelerator=cpu"]) == 2
    error = capsys.readouterr().err
    assert "needs at least 32.4 GiB" in error
    assert "tokenizer 1774.6M" in error
    assert "8.0 GiB of memory" in error
    assert not run.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer.stages.0.d_model=33", "tokenizer: d_model 33 must be an even multiple"),
        ("tokenizer.sampling_rate=16000", "24000"),
        ("semantic.config=null", "either config"),
        ("max_updates=1.5", "max_updates=1.5 has to be a whole number at least 0, or null"),
    ],
)
def test_impossible_configurations_are_one_line_and_leave_nothing(
    small_overrides, tmp_path, error_line, override, message
):
    run = tmp_path / "run"
    assert message in error_line(["fit", *small_overrides, f"run_dir={run}", override])
    assert not list(run.glob("checkpoints"))


def test_differences_name_every_leaf():
    old = {"a": 1, "b": {"c": [1, {"d": 2}]}, "gone": 3}
    new = {"a": 1, "b": {"c": [1, {"d": 4}]}, "new": 5}
    assert diff_config(old, new) == ["b.c[1].d: 2 -> 4", "gone: 3 -> None", "new: None -> 5"]


def test_unreadable_samples_are_named_and_stop_the_run_past_the_ceiling(packed, small_overrides, tmp_path, capsys):
    damaged = tmp_path / "shards"
    shutil.copytree(packed, damaged)
    for tar in damaged.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        for start in [match.start() for match in re.finditer(b"fLaC", content)]:
            content[start : start + 4] = b"nope"
        tar.write_bytes(content)
    others = [override for override in small_overrides if not override.startswith("data.train=")]
    overrides = [*others, f"data.train={damaged}", f"run_dir={tmp_path / 'run'}"]
    assert main(["fit", *overrides, "data.max_invalid_fraction=0"]) == 2
    error = capsys.readouterr().err
    assert "skipped" in error
    assert re.search(r"(\d+) of \1 samples could not be used .* more than max_invalid_fraction=0 allows", error)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["update-00000000"]


def test_every_update_is_described_in_full(whole):
    rows = read_table(whole / "metrics.csv")
    assert rows[0].keys() == set(metric_columns(Objective(24_000)))
    for row in rows:
        assert float(row["weighted/reconstruction"]) == pytest.approx(15 * float(row["loss/reconstruction"]))
        assert float(row["update_seconds"]) > float(row["data_wait_seconds"]) > 0
    parts = [name for name in Objective(24_000).names if rows[-1][f"weighted/{name}"]]
    total = sum(float(rows[-1][f"weighted/{name}"]) for name in parts)
    assert total == pytest.approx(float(rows[-1]["loss/generator"]), rel=1e-5)
    assert column(rows, "discriminator_score/real") != column(rows, "discriminator_score/generated")
    shares = [
        [float(row[f"gradient_share/{name}"] or 0) for name in Objective(24_000).output_names] for row in rows[1::2]
    ]
    assert [sum(values) for values in shares] == pytest.approx([1.0] * 4)
    assert [sum(map(bool, values)) for values in shares] == [1, 1, 3, 3]
    assert column(rows[::2], "gradient_share/reconstruction") == []


def test_codebooks_and_hours_have_tables_of_their_own(whole):
    codebooks = read_table(whole / "codebooks.csv")
    assert [row["update"] for row in codebooks] == ["3", "6"]
    frames = sum(-(-int(float(row["audio_seconds"]) * 24000) // 1920) for row in read_table(whole / "metrics.csv")[:3])
    assert float(codebooks[0]["frames"]) >= frames
    assert all(1 <= float(row[f"perplexity/{level}"]) <= 32 for row in codebooks for level in (1, 2, 3, 4))
    hours = read_table(whole / "audio_hours.csv")[-1]
    seconds = sum(column(read_table(whole / "metrics.csv")[:6], "audio_seconds"))
    assert sum(float(hours[domain]) for domain in ("music", "sound", "speech")) * 3600 == pytest.approx(seconds)


def test_the_run_says_on_what_it_was_computed(whole):
    (start,) = json.loads((whole / "environment.json").read_text())["starts"]
    assert (start["update"], start["processes"]) == (0, 1)
    assert torch.__version__.startswith(start["versions"]["torch"])
    assert start["cpus"] >= 1
