import subprocess
import sys

import pytest

from moss_train.utils.errors import UserError
from moss_train.utils.files import file_lock

HOLDER = """
import sys, time
from pathlib import Path
from moss_train.utils.files import file_lock
with file_lock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.processes
def test_a_second_process_is_refused_until_the_first_one_is_killed(tmp_path):
    lock = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="runs/a is in use by another process"), file_lock(lock, "runs/a", 0.2):
        pass
    holder.kill()
    holder.wait()
    with file_lock(lock, "runs/a", 0.2), pytest.raises(UserError), file_lock(lock, "runs/a", 0.0):
        pass
