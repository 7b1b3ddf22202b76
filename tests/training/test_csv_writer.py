import errno
import os
import resource
import subprocess
import sys

import pytest

from moss_train.training.loggers.base import CsvWriter, read_table

from .runs import column


def rows_until(path, updates, columns=("update", "loss/generator", "seconds")):
    writer = CsvWriter(path, columns)
    writer.start(0)
    for update in range(1, updates + 1):
        writer.write(path.stem, {"update": update, "loss/generator": update / 3, "seconds": 0.1})
    writer.close()


def test_rows_after_the_checkpoint_are_done_again(tmp_path):
    path = tmp_path / "metrics.csv"
    rows_until(path, 3)
    path.write_text(path.read_text() + "4,0.1")  # a row truncated by a kill
    assert len(read_table(path)) == 3
    writer = CsvWriter(path, ("update", "loss/generator", "seconds"))
    writer.start(2)
    writer.write("metrics", {"update": 3, "loss/generator": 7.0})
    writer.close()
    assert column(read_table(path), "loss/generator") == [1 / 3, 2 / 3, 7.0]
    assert column(read_table(path), "seconds") == [0.1, 0.1]  # only rows where it applies


def test_a_file_with_other_columns_keeps_them_and_gets_the_new_ones(tmp_path):
    path = tmp_path / "metrics.csv"
    rows_until(path, 1, ("update", "loss/generator", "seconds", "older"))
    writer = CsvWriter(path, ("update", "loss/generator", "newer"))
    writer.start(1)
    writer.write("metrics", {"update": 2, "newer": 5})
    writer.close()
    rows = read_table(path)
    assert list(rows[0]) == ["update", "loss/generator", "seconds", "older", "newer"]
    assert [row["newer"] for row in rows] == ["", "5"]


def test_columns_of_an_older_run_are_read_and_continued_under_their_present_names(tmp_path):
    path = tmp_path / "validation.csv"
    path.write_text("update,text_nats,text_nats_blind,text_nats/8\n1,2.0,3.0,2.5\n")
    writer = CsvWriter(path, ("update", "text_lm_loss"))
    writer.start(1)
    writer.write("validation", {"update": 2, "text_lm_loss": 1.0})
    writer.close()
    header = "update,text_lm_loss,text_lm_loss_no_audio,text_lm_loss/8"
    assert path.read_text("utf-8").splitlines() == [header, "1,2.0,3.0,2.5", "2,1.0,,"]


def test_a_writer_takes_the_rows_of_its_own_table(tmp_path):
    writer = CsvWriter(tmp_path / "validation.csv", ("update",))
    writer.start(0)
    writer.write("metrics", {"update": 1, "loss/generator": 2.0})
    writer.write("validation", {"update": 1})
    writer.close()
    assert read_table(tmp_path / "validation.csv") == [{"update": "1"}]


def test_no_file_is_no_rows(tmp_path):
    assert read_table(tmp_path / "metrics.csv") == []


def test_a_disk_that_fills_up_is_an_error_that_names_the_table_and_loses_no_row(tmp_path):
    path = tmp_path / "metrics.csv"
    rows_until(path, 3)
    writer = CsvWriter(path, ("update", "loss/generator", "seconds"))
    writer.start(3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, limits[1]))
    try:
        for do in (lambda: writer.write("metrics", {"update": 4, "loss/generator": 1 / 3}), writer.close):
            with pytest.raises(OSError, match="File too large") as caught:
                do()
            assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["update"] for row in read_table(path)] == ["1", "2", "3"]


WRITE_ROW = """
import sys
from pathlib import Path
from moss_train.training.loggers.base import CsvWriter
writer = CsvWriter(Path(sys.argv[1]), ("update", "stage"))
writer.start(0)
writer.write("metrics", {"update": 1, "stage": chr(0xe9)})
writer.close()
"""


def test_a_table_is_utf_8_whatever_the_locale(tmp_path):
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", WRITE_ROW, str(tmp_path / "metrics.csv")], env=ascii_only, check=True)
    assert read_table(tmp_path / "metrics.csv") == [{"update": "1", "stage": "\xe9"}]
