import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from moss_train import load_config
from moss_train.training.callbacks.summary import codebook_lines, panels, read_history, validation_table
from moss_train.training.loggers.base import clock, read_table
from moss_train.training.run.fit import fit


def test_a_run_ends_with_a_summary(whole):
    text = (whole / "summary.md").read_text()
    assert text.startswith(f"# {whole.parent.name}/{whole.name}\n\nFinished at update 8 of 8.\n")
    assert "| stages, by their first update | reconstruction from 1, adversarial from 5 |" in text
    hours = read_table(whole / "audio_hours.csv")
    assert hours
    assert "speech 0.0" in text
    assert "No validation: `validation.data` was not set." in text
    assert "Codebooks at update 6: " in text
    assert text.endswith("## Warnings\n\nNone.\n")
    assert "![Curves of the run](summary.png)" in text
    width, height = struct.unpack(">II", (whole / "summary.png").read_bytes()[16:24])
    assert width > 500 < height  # from the header of the PNG


def test_curves_are_means_over_stretches_of_the_run():
    rows = [
        {"update": str(update), "stage": "a" if update < 500 else "b", "loss/reconstruction": str(float(update % 2))}
        for update in range(1, 1001)
    ]
    course = read_history(rows, 1000)
    assert course.stages == {"a": 1, "b": 500}
    (panel,) = panels(course, [], [])
    (curve,) = panel.curves
    assert len(curve.values) == 501
    assert all(later - earlier == 2 for earlier, later in pairwise(curve.updates))
    assert set(curve.values[1:-1]) == {0.5}


def test_a_long_validation_is_shown_in_twelve_rows():
    rows = [
        {
            "update": str(i),
            "clips": "4",
            "mel_distance/1": "3.0",
            "mel_distance/4": str(2 - i / 100),
            "text_lm_loss": "",
        }
        for i in range(100)
    ]
    lines = validation_table(rows)
    table = [line for line in lines if line.startswith("|")]
    assert table[0] == "| update | mel, 1 level | mel, 4 levels |"
    assert len(table) == 2 + 12
    assert table[2] == "| 0 | 3.000 | 2.000 |"
    assert table[-1] == "| 99 | 3.000 | 1.010 |"


@pytest.mark.parametrize(("seconds", "text"), [(59, "0:01 h"), (3700, "1:02 h"), (200_000, "2 d 07:33 h")])
def test_times_are_readable(seconds, text):
    assert clock(seconds) == text


def test_samples_of_skipped_updates_are_written_down(small_overrides, tmp_path, capsys):
    """With a learning rate that breaks the weights, the next updates are not finite and the run stops."""
    overrides = [*small_overrides, f"run_dir={tmp_path}", "stages.0.learning_rate=1e30", "stages.0.warmup_updates=0"]
    with pytest.raises(FloatingPointError, match="3 in a row"):
        fit(load_config("fit", overrides))
    assert capsys.readouterr().err.count("training: 3/8 updates in ") == 1  # the progress bar was closed
    entries = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in entries] == [2, 3, 4]
    assert all("loss/reconstruction" in entry["not_finite"] for entry in entries)
    assert all(entry["sample_ids"] and entry["rank"] == 0 for entry in entries)


def test_a_summary_that_cannot_be_written_is_a_warning(small_config, capsys):
    config = small_config("max_updates=1")
    (Path(config.run_dir) / "summary.md").mkdir(parents=True)
    assert fit(config).update == 1
    assert "warning: summary.md could not be written: " in capsys.readouterr().err


def test_updates_without_clips_have_no_codebooks_to_speak_of():
    used = {"update": "100", "usage/0": "0.9", "mean_usage": "0.9", "mean_perplexity": "7.0", "frames": "50"}
    empty = dict.fromkeys(used, "") | {"update": "200"}
    assert codebook_lines([used, empty]) == codebook_lines([used])
    assert codebook_lines([empty]) == []
