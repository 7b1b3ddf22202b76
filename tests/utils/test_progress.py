import re

import pytest

from moss_train.utils.progress import progress


def test_without_a_terminal_one_plain_line_says_what_was_done(capsys):
    with progress("encoding", total=3) as task:
        for count in range(3):
            task.advance(note=f"{count} h")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("encoding: 3/3 clips in ")
    assert captured.err.endswith("s, 2 h\n")
    assert captured.err.count("\n") == 1


def test_unknown_total_and_units(capsys):
    with progress("reading", unit="files") as task:
        task.advance(2)
    assert capsys.readouterr().err.startswith("reading: 2 files in ")


def test_an_error_passes_through_and_the_line_says_how_far_it_came(capsys):
    def pack():
        with progress("packing", total=9) as task:
            task.advance(4)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pack()
    assert capsys.readouterr().err.startswith("packing: 4/9 clips")


def test_what_was_done_earlier_is_there_from_the_start_and_does_not_count_as_speed(capsys):
    with progress("training", total=8, unit="updates", completed=6) as task:
        assert not task.is_visible
        assert task.progress.tasks[0].speed is None
        task.advance()
    assert capsys.readouterr().err.startswith("training: 7/8 updates in ")


def test_in_a_terminal_of_80_columns_nothing_of_the_bar_and_its_note_is_cut(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    note = "adversarial: rec 1.234, sem 2.34, D 1.95, 1170 audio-s/s, held out 1.304"
    with progress("training", total=1020000, unit="updates", completed=520000) as task:
        for _ in range(3):
            task.advance(note=note)
        assert task.is_visible
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).replace("\r", "\n").splitlines()
    assert note in [line.rstrip() for line in lines]
    bars = [line for line in lines if "520003/1020000" in line]
    assert bars
    assert all(re.search(r"520003/1020000 \S+ updates/s \d+:\d\d:\d\d$", line.rstrip()) for line in bars)
