"""Kill a training command at random times until the required number of kills; the result must equal a whole run.

Every start is a fresh `python -m moss_train fit`, killed with SIGKILL by another process after a random time that does
not depend on the program. This is slower than the tests, which kill at given points of the program.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import TINY, Fit, Launcher, assert_same_run

from moss_train.cli.main import main as command_line

ROOT = Path(__file__).parents[2]
LONG = ("stages.0.updates=150", "stages.1.updates=150", "checkpoint.every_updates=5", "data.num_workers=1")


def main() -> int:
    """Run, kill, compare. Returns 0 if both runs are bit-identical."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None, help="of the times; random without it")
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "shards"
        manifest = ROOT / "recipes" / "quickstart" / "audio" / "train.jsonl"
        assert command_line(["pack", f"input={manifest}", f"out={data}", "shard_bytes=300000"]) == 0
        launcher = Launcher(folder)
        whole, killed = (Fit(launcher, folder / run, (f"data.train={data}", *LONG)) for run in ("whole", "killed"))
        begin = time.monotonic()
        whole.finish(limit_seconds=1800)
        kills = kill_until_finished(killed, arguments.kills, random.Random(seed), time.monotonic() - begin)
        assert_same_run(killed, whole)
        launcher.close()
    print(f"{kills} kills, seed {seed}: losses, weights and moments equal to the last bit")
    return 0


def kill_until_finished(fit: Fit, kills: int, generator: random.Random, seconds: float) -> int:
    """Restart a run and kill it after a random time until it was killed `kills` times; then let it finish."""
    command = [sys.executable, "-m", "moss_train", "fit", *TINY, *fit.overrides, f"run_dir={fit.directory}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = 0
    while done < kills:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        wait_for_start(fit, process)
        time.sleep(generator.uniform(0, seconds / kills))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        done += 1
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment)
    return done


def wait_for_start(fit: Fit, process: subprocess.Popen) -> None:
    """Wait until the run opens its metrics, at most two minutes: starting takes longer than the updates do."""
    path = fit.directory / "metrics.csv"
    before = path.stat().st_ino if path.exists() else 0
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.stat().st_ino != before:
            return
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
