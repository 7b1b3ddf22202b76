"""The recordings of the quickstart: complete, readable, and no family on both sides of the split."""

import json
from pathlib import Path

import pytest
import soundfile

AUDIO = Path(__file__).resolve().parent.parent / "recipes/quickstart/audio"


def entries(name):
    return [json.loads(line) for line in (AUDIO / name).read_text(encoding="utf-8").splitlines()]


def family(entry):
    return Path(entry["path"]).stem.split("_")[0]


def test_manifests_name_every_recording_once():
    paths = [entry["path"] for name in ("train.jsonl", "heldout.jsonl") for entry in entries(name)]
    assert len(paths) == len(set(paths)) == 175
    assert set(paths) == {path.relative_to(AUDIO).as_posix() for path in AUDIO.rglob("*.flac")}


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_recordings_are_what_the_recipe_expects(name):
    for entry in entries(name):
        info = soundfile.info(AUDIO / entry["path"])
        assert (info.samplerate, info.channels, info.subtype) == (24_000, 1, "PCM_16"), entry["path"]
        assert entry["path"].startswith(entry["domain"] + "/")
        assert ("text" in entry) == ("task" in entry)
        assert entry.get("task") == ("asr" if entry["domain"] == "speech" else "caption" if "text" in entry else None)


def test_whole_sound_families_are_held_out_and_every_domain_is_on_both_sides():
    train, heldout = entries("train.jsonl"), entries("heldout.jsonl")
    sounds = [{family(e) for e in part if e["domain"] == "sound"} for part in (train, heldout)]
    assert sounds[1] == {"misc", "sn", "vinyl"}
    assert not sounds[0] & sounds[1]
    assert {e["domain"] for e in train} == {e["domain"] for e in heldout} == {"speech", "sound", "music"}
    assert {e["speaker"] for e in heldout if e["domain"] == "speech"} == {"cards", "librivox"}


def test_notice_names_the_licence_of_every_recording():
    notice = (AUDIO / "NOTICE").read_text(encoding="utf-8")
    licences = dict(line.split(" | ")[:2] for line in notice.splitlines() if ".flac | " in line)
    assert set(licences) == {entry["path"] for name in ("train.jsonl", "heldout.jsonl") for entry in entries(name)}
    assert set(licences.values()) == {"CC0", "CC0 [1]", "BSD-2"}
