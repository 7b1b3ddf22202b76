import json
import shutil
from pathlib import Path

import pytest

from moss_train.cli.main import main
from moss_train.training.loggers.base import read_table
from moss_train.utils.checkpoint import list_checkpoints

from .runs import column

QUICK = [
    "experiment=finetune",
    "data.num_workers=0",
    "data.crop_seconds=0.5",
    "data.micro_batch_seconds=8",
    "stages.0.batch_seconds=6",
    "stages.0.warmup_updates=0",
    "objective.discriminator_crop_seconds=0.1",
    "trainer.accelerator=cpu",
    "trainer.num_threads=1",
]
NO_NETWORKS = ["stages.0.adversarial=false", "discriminators=[]", "semantic=null"]


@pytest.fixture(scope="module")
def init(small_overrides, tmp_path_factory) -> Path:
    """Export a model of the small recipe after almost no training."""
    directory = tmp_path_factory.mktemp("init")
    updates = ["stages.0.updates=3", "stages.1.updates=0", "stages.0.learning_rate=1e-3"]
    assert main(["fit", *small_overrides, *updates, f"run_dir={directory / 'run'}"]) == 0
    assert main(["export", f"checkpoint={directory / 'run'}", f"out={directory / 'model'}"]) == 0
    return directory / "model"


@pytest.fixture
def audio(recordings, tmp_path) -> Path:
    """Return a few real recordings as plain files in a folder."""
    folder = tmp_path / "audio"
    folder.mkdir()
    for file in sorted((recordings / "speech").glob("*.flac"))[:6]:
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("changes", [[], ["tokenizer.sampling_rate=16000"], ["tokenizer.number_channels=2"]])
def test_a_plain_folder_fine_tunes_a_model_also_at_another_rate_and_in_stereo(init, audio, tmp_path, changes):
    run = tmp_path / "run"
    schedule = ["stages.0.updates=16", "stages.0.learning_rate=1e-3", *NO_NETWORKS, f"run_dir={run}"]
    assert main(["fit", *QUICK, f"init={init}", f"data.path={audio}", *schedule, *changes]) == 0
    loss = column(read_table(run / "metrics.csv"), "loss/reconstruction")
    assert sum(loss[-4:]) < 0.95 * sum(loss[:4])


def test_the_shards_are_part_of_what_a_run_was_started_with(init, audio, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["fit", *QUICK, *NO_NETWORKS, f"init={init}", f"data.path={audio}", f"run_dir={run}"]
    assert main([*command, "max_updates=1"]) == 0
    record = json.loads((run / "packed.json").read_text())
    assert record["train"].startswith(str(run / "packed"))
    name = sorted(audio.iterdir())[0]
    name.rename(tmp_path / name.name)
    assert main([*command, "max_updates=2"]) == 2
    assert "are not those that" in capsys.readouterr().err
    assert main([*command, "max_updates=2", "allow_config_changes=true"]) == 0
    shutil.rmtree(audio)
    assert main([*command, "max_updates=3"]) == 0
    assert "is gone, continuing with" in capsys.readouterr().err
    assert list_checkpoints(run / "checkpoints")[-1].name == "update-00000003"


def test_texts_of_a_manifest_need_a_text_lm_and_clips_without_leave_it_out(init, recordings, audio, tmp_path, capsys):
    command = ["fit", *QUICK, f"init={init}", "max_updates=1", "discriminators.0.channels=[2,4]"]
    command += ["discriminators.1.channels=2", "semantic.config.hidden_size=32", "semantic.config.num_hidden_layers=1"]
    with pytest.warns(UserWarning, match="no clip has a text that is used: the text LM is not built"):
        assert main([*command, f"data.path={audio}", f"run_dir={tmp_path / 'plain'}"]) == 0
    lines = [line for line in (recordings / "train.jsonl").read_text().splitlines() if '"text"' in line]
    entries = [json.loads(line) for line in lines[:6]]
    manifest = tmp_path / "texts.jsonl"
    manifest.write_text("".join(json.dumps(e | {"path": str(recordings / e["path"])}) + "\n" for e in entries))
    with pytest.warns(UserWarning, match="semantic newly initialised"):
        assert main([*command, f"data.path={manifest}", f"run_dir={tmp_path / 'texts'}"]) == 0
    assert column(read_table(tmp_path / "texts" / "metrics.csv"), "loss/semantic")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=./nowhere"], "data.path=./nowhere does not exist"),
        (["data.path=.", "data.train=."], "data.path=. excludes data.train"),
        (["data.path=.", "data.heldout_fraction=1"], "data.heldout_fraction=1"),
        (["data.path=."], "has no audio files"),
    ],
)
def test_bad_requests_are_one_line(init, tmp_path, monkeypatch, error_line, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no audio")
    assert message in error_line(["fit", *QUICK, *NO_NETWORKS, f"init={init}", *arguments, "run_dir=run"])
