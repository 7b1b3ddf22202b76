"""The recipe that compares a run's text LM with one trained without audio."""

import csv
import math
import runpy
import sys
from pathlib import Path

import pytest

from moss_train.cli.main import main

RECIPE = Path(__file__).parents[2] / "recipes" / "proof"


def column(path: Path, name: str) -> list[float]:
    with path.open(newline="") as file:
        return [float(row[name] or 0) for row in csv.DictReader(file)]


def call(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    path = str(RECIPE / script)
    monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
    runpy.run_path(path, run_name="__main__")


def test_the_blind_lm_reads_the_texts_of_the_run(small_overrides, recordings, tmp_path, monkeypatch, capsys):
    validation = [f"validation.data={recordings / 'heldout.jsonl'}", "validation.max_clips=6"]
    plain = ["stages.0.learning_rate=1e-2", "validation.samples_clips=null", f"run_dir={tmp_path}"]
    assert main(["fit", *small_overrides, *validation, *plain]) == 0
    call("blind_lm.py", monkeypatch, tmp_path, "--rate-factors", "0", "1", "--weight-decays", "0.1", "--every", "6")
    assert column(tmp_path / "blind.csv", "update") == [6, 8, 6, 8]
    texts = column(tmp_path / "metrics.csv", "clips_with_text")
    assert column(tmp_path / "blind.csv", "texts") == 2 * [sum(texts[:6]), sum(texts)]
    start, still, _, learned = column(tmp_path / "blind.csv", "text_lm_loss")
    assert start == still == pytest.approx(math.log(257), abs=0.1)
    assert learned < start - 0.05
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call("prove.py", monkeypatch, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| text given its audio is below the best blind LM | ")
    assert end.value.code == int(any(line.endswith("| no |") for line in lines))


@pytest.mark.parametrize(
    ("changes", "blind", "holds"),
    [
        ({}, 2.0, [True, True, True, True]),
        ({}, 1.9, [False, True, True, True]),
        ({"text_lm_loss_no_audio": 1.9}, 2.0, [True, False, True, True]),
        ({"mel_distance/4": 3.0}, 2.0, [True, True, False, True]),
        ({"usage/2": 0.8}, 2.0, [True, True, True, False]),
        ({"usage/2": 0.8}, None, [True, False]),
    ],
)
def test_each_claim_needs_its_numbers(changes, blind, holds):
    row = {"text_lm_loss": 1.9, "text_lm_loss_no_audio": 2.1, "mel_distance/1": 3.0, "mel_distance/4": 2.5}
    row |= {"mel_distance/16": 2.4, "mel_distance/speech/1": 1.0, "usage/1": 0.7, "usage/2": 0.9, "usage/3": 1.0}
    found = runpy.run_path(str(RECIPE / "prove.py"))["claims"](row | changes, blind)
    assert [claim.holds for claim in found] == holds
    assert any("(1, 4, 16 levels)" in claim.text for claim in found)


def test_texts_of_new_voices_are_not_held_against_the_lm():
    train = [{"speaker": "a", "text": "one"}, {"speaker": "b", "text": None}, {"speaker": None, "text": "a bell"}]
    held = [{"id": number, "speaker": who, "text": "two", "task": "asr"} for number, who in enumerate(["a", "b", None])]
    kept = runpy.run_path(str(RECIPE / "known_voices.py"))["with_known_voices"](train, held)
    assert [(clip["id"], clip["text"], clip["task"]) for clip in kept] == [
        (0, "two", "asr"),
        (1, None, None),
        (2, None, None),
    ]
