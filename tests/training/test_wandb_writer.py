"""Logging with the real wandb package; no test needs a network beyond this machine."""

import json
import os

import pytest
import wandb

from moss_train.training.loggers import wandb as wandb_access
from moss_train.training.loggers.wandb import WandbWriter, has_key, run_id

from .runs import silent_sample

KEY = "a" * 40


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """Use an environment without an API key or mode."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_keys_come_from_the_environment_and_from_netrc(monkeypatch, tmp_path):
    assert not has_key("https://api.wandb.ai")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert has_key("https://api.wandb.ai")
    assert has_key("https://api.forge.coreweave.com")
    assert not has_key("https://wandb.example.org")
    monkeypatch.setenv("WANDB_API_KEY", "other")
    assert has_key("https://wandb.example.org")


def test_no_key_is_quietly_offline_and_a_resume_keeps_the_id(tmp_path, capfd):
    directory = tmp_path / "runs" / "x"
    directory.mkdir(parents=True)
    for update in (1, 2):
        writer = WandbWriter(directory, "auto", 1, {"name": "x"})
        writer.start(update - 1)
        assert writer.run is not None
        assert writer.run.id == run_id(directory)
        writer.write("metrics", {"update": update, "loss/generator": 1.5})
        writer.show([silent_sample(tmp_path, update)])
        writer.close()
    media = list((directory / "wandb").rglob("*levels-04*.flac"))
    assert len(media) == 2
    runs = list((directory / "wandb").glob("offline-run-*"))
    # Names consist of the second, the id, and a number if the second already has one.
    assert {path.name.split("-")[3] for path in runs} == {run_id(directory)}
    assert capfd.readouterr() == ("", "")


def test_a_server_that_cannot_be_reached_is_one_warning(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_access, "INIT_SECONDS", 1.0)
    wandb.teardown()  # wandb reads the environment only once
    writer = WandbWriter(tmp_path, "auto", 1, {})
    writer.start(0)
    assert writer.run.offline
    writer.write("metrics", {"update": 1, "loss/generator": 1.5})
    writer.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: wandb is offline: ")


def test_a_directory_that_cannot_be_written_is_one_warning_and_nothing_else(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    writer = WandbWriter(tmp_path / "file" / "run", "offline", 1, {})
    writer.start(0)
    writer.write("metrics", {"update": 1})
    writer.show([])
    writer.close()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: wandb is off from here on: ")


@pytest.mark.parametrize("found", ["../../x", "a/b", "", "x" * 65, 3, None, ["a"]])
def test_an_id_that_is_none_is_drawn_anew(tmp_path, found):
    (tmp_path / "wandb.json").write_text(json.dumps({"id": found}))
    drawn = run_id(tmp_path)
    assert len(drawn) == 8
    assert run_id(tmp_path) == drawn


def test_credentials_of_addresses_do_not_leave_the_machine():
    config = {
        "data": {"train": ["https://me:secret@host/shards", "s3://bucket/x?X-Amz-Signature=secret", "/a@b/c"]},
        "seed": 3,
        "name": None,
    }
    assert wandb_access.without_credentials(config) == {
        "data": {"train": ["https://host/shards", "s3://bucket/x", "/a@b/c"]},
        "seed": 3,
        "name": None,
    }
