"""Real commands for fault tests: started, watched with a time limit, and compared bit by bit."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from moss_train.training.callbacks.metrics import CLOCK_COLUMNS
from moss_train.training.loggers.base import read_table
from moss_train.utils.checkpoint import CHECKPOINT_FILE, MANIFEST, find_damage, list_checkpoints

LIMIT_SECONDS = float(os.environ.get("FAULTS_LIMIT_SECONDS", "180"))
"""A command that takes longer hangs: about twenty times what it needs beside other work."""

SCALE = int(os.environ.get("FAULTS_SCALE", "1"))
"""How many times more kills and examples than in the ordinary test run."""

KILLS_PER_RUN = 3
CALLS_PER_UPDATE = 30_000
"""Python calls of about one update with its metrics and a checkpoint: how far into an update a kill may come."""

FIRST = ["update-00000003", "update-00000004"]  # of a run that stopped after four updates
FINISHED = ["update-00000006", "update-00000009", "update-00000012"]  # the end of the first stage and the two newest

_PATCH = "{patch_size: %d, output_dimension: %d, d_model: 8, num_heads: 1, num_layers: 1}"
TINY = (
    "experiment=cat_tiny",
    f"tokenizer.stages.0={_PATCH % (240, 8)}",
    f"tokenizer.stages.1={_PATCH % (2, 8)}",
    f"tokenizer.stages.2={_PATCH % (2, 8)}",
    f"tokenizer.stages.3={_PATCH % (2, 8)}",
    "tokenizer.quantizer={rvq_dim: 8, num_quantizers: 3, codebook_size: 16, codebook_dim: 4}",
    "semantic.config.hidden_size=16",
    "semantic.config.intermediate_size=16",
    "semantic.config.num_hidden_layers=1",
    "semantic.config.num_attention_heads=1",
    "semantic.config.num_key_value_heads=1",
    "discriminators.0.periods=[2]",
    "discriminators.0.channels=[2]",
    "discriminators.1.channels=1",
    "discriminators.1.window_lengths=[256]",
    "objective.discriminator_crop_seconds=0.08",
    "data.crop_seconds=0.25",
    "data.max_seconds=0.8",
    "data.micro_batch_seconds=0.8",
    "data.num_workers=0",
    "objective.quantizer_dropout=1.0",
    "objective.weights.commitment=0.25",
    "objective.weights.relative_error=0",
    "stages=[{name: reconstruction, updates: 6, batch_seconds: 1.2, learning_rate: 1.5e-3, "
    "final_learning_rate: 3.0e-4, warmup_updates: 2}, {name: adversarial, updates: 6, batch_seconds: 0.9, "
    "adversarial: true, learning_rate: 3.0e-4, final_learning_rate: 7.5e-5, discriminator_learning_rate: 3.0e-4, "
    "warmup_updates: 2, discriminator_warmup_updates: 2}]",
    "checkpoint.every_updates=3",
    "wandb=null",
)
"""Overrides of `fit` that shrink the whole recipe until an update takes some hundredths of a second.

Both stages, text, quantizer dropout on every clip, discriminators with a warm-up, and several micro-batches per
update stay. Twelve updates, a checkpoint at 0, 3, 6, 9 and 12.
"""


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    status: int  # exit status, or minus the number of the signal
    log: str  # standard output and standard error


class Job:
    """One running command line."""

    def __init__(self, launcher: "Launcher", pid: int, log: Path) -> None:
        self.launcher = launcher
        self.pid = pid
        self.log = log
        self.status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, or None while the command runs."""
        if self.status is None:
            self.status = self.launcher.ask({"poll": self.pid})
        return self.status

    def wait(self, limit_seconds: float = LIMIT_SECONDS) -> Outcome:
        """Wait for the end, then kill any remaining processes of its group; a timeout is a failure."""
        deadline = time.monotonic() + limit_seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.03)
        if self.status is None:
            self.kill_group()
        log = self.log.read_text(errors="replace")
        assert self.status is not None, f"still running after {limit_seconds} s:\n{log[-3000:]}"
        return Outcome(self.status, log)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process only."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kill the process and its workers."""
        os.killpg(self.pid, signal.SIGKILL)


def is_alive(process: int) -> bool:
    """Tell whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_numbers(job: Job) -> list[int]:
    """Wait for a line of numbers in the program's output and return them."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while (line := re.search(r"^[\d ]+\n", log := job.log.read_text(errors="replace"), re.MULTILINE)) is None:
        assert job.poll() is None, log
        assert time.monotonic() < deadline, log
        time.sleep(0.03)
    return [int(word) for word in line[0].split()]


class Launcher:
    """Starts command lines as forks of one prepared process, see `forking.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: list[Job] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forking.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def start_ranks(self, *arguments: str, environment: Mapping[str, str] | None = None) -> "list[Job]":
        """Start two processes of one run, as torchrun does, with the same `environment`."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        common |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "faults", "TORCHELASTIC_USE_AGENT_STORE": "False"}
        common |= {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", **(environment or {})}
        return [
            self.start(*arguments, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]

    def start_script(self, script: str | Path, *arguments: str) -> Job:
        """Start a Python file with these arguments."""
        return self._start({"script": str(script), "arguments": arguments, "environment": {}, "fault": {}})

    def _start(self, order: Mapping[str, Any]) -> Job:
        log = self.folder / f"{len(self.jobs)}.log"
        log.touch()
        self.jobs.append(Job(self, self.ask({"start": {**order, "log": str(log)}}), log))
        return self.jobs[-1]

    def ask(self, order: Mapping[str, Any]) -> Any:
        """Send one request and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, *arguments: str, fault: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
    ) -> Job:
        """Start `python -m moss_train` with these arguments, with a fault of `forking.inject`."""
        return self._start({"arguments": arguments, "environment": environment or {}, "fault": fault or {}})

    def run(self, *arguments: str, limit_seconds: float = LIMIT_SECONDS, **options: Any) -> Outcome:
        """Start a command and wait for its end."""
        return self.start(*arguments, **options).wait(limit_seconds)

    def close(self) -> None:
        """End the prepared process and all processes that failed tests left running."""
        for job in self.jobs:
            if job.poll() is None:
                job.kill_group()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(LIMIT_SECONDS)


@dataclass(frozen=True)
class Fit:
    """A tiny training run in its own directory; it can be started any number of times."""

    launcher: Launcher
    directory: Path
    overrides: tuple[str, ...]

    def arguments(self, *overrides: str) -> tuple[str, ...]:
        """Return the command line."""
        return ("fit", *TINY, *self.overrides, f"run_dir={self.directory}", *overrides)

    def start(self, *overrides: str, **options: Any) -> Job:
        """Start the run."""
        return self.launcher.start(*self.arguments(*overrides), **options)

    def run(self, *overrides: str, **options: Any) -> Outcome:
        """Start the run and wait for its end."""
        return self.launcher.run(*self.arguments(*overrides), **options)

    def start_ranks(self, *overrides: str) -> list[Job]:
        """Start the run as two processes."""
        return self.launcher.start_ranks(*self.arguments(*overrides))

    def finish(self, *overrides: str, **options: Any) -> Outcome:
        """Start the run and wait; it has to succeed."""
        outcome = self.run(*overrides, **options)
        assert outcome.status == 0, outcome.log[-3000:]
        return outcome

    @property
    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints, oldest first."""
        return [path.name for path in list_checkpoints(self.directory / "checkpoints")]

    def newest(self) -> Path:
        """Return the newest checkpoint, valid or not."""
        return list_checkpoints(self.directory / "checkpoints")[-1]

    def rows(self) -> list[dict[str, str]]:
        """Return the rows of metrics.csv as text, without measured times."""
        return values(self.directory)

    def state(self) -> dict[str, Any]:
        """Return the content of the newest checkpoint."""
        return state(self.directory)

    def begin(self) -> "Fit":
        """Run until update 4, which leaves two checkpoints."""
        self.finish("max_updates=4")
        assert self.checkpoints == FIRST
        return self

    def finish_after_kills(self, seed: int, **fault: Any) -> int:
        """Kill the run at seeded points (fewer if it ends earlier), then let it finish. Returns the number of kills."""
        generator, kills = random.Random(seed), 0
        places = [(generator.randint(1, 4), generator.randrange(CALLS_PER_UPDATE)) for _ in range(KILLS_PER_RUN)]
        for update, further in places:  # counted within the process: a resume continues from update 0, 3, 6 or 9
            outcome = self.run(fault={"calls": ["CatModule.training_step", update, further], **fault})
            self.assert_sound()
            if outcome.status == 0:
                break
            assert outcome.status == -signal.SIGKILL, outcome.log[-3000:]
            kills += 1
        self.finish()
        return kills

    def assert_sound(self, names: Sequence[str] | None = None) -> None:
        """Assert that no incomplete checkpoint has a checkpoint's name; `names`, if given, are all that exist."""
        assert names is None or self.checkpoints == names
        damage = {name: find_damage(self.directory / "checkpoints" / name) for name in self.checkpoints}
        assert set(damage.values()) <= {None}, damage

    def leftovers(self) -> list[Path]:
        """Return the incomplete checkpoints."""
        return [path for path in (self.directory / "checkpoints").iterdir() if path.name.startswith(".")]

    def kills_in_a_write(self) -> list[dict[str, Any]]:
        """Return faults that kill the write of the checkpoint at update 6: in the file, before manifest and rename."""
        size = (self.newest() / CHECKPOINT_FILE).stat().st_size
        percents = (50, 99) if SCALE == 1 else (5, 50, 90, 99)
        return [
            *({"file_bytes_kill": size * percent // 100} for percent in percents),
            {"event": ["open", MANIFEST, 3]},  # two were opened for reading at the start
            {"event": ["os.rename", ".partial-update-00000006", 1]},
        ]


def values(directory: Path) -> list[dict[str, str]]:
    """Return the metrics of a run as text, without measured times."""
    rows = read_table(directory / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in CLOCK_COLUMNS} for row in rows]


def state(directory: Path) -> dict[str, Any]:
    """Return the content of a run's newest checkpoint."""
    return torch.load(list_checkpoints(directory / "checkpoints")[-1] / CHECKPOINT_FILE, weights_only=True)


def assert_same_run(ours: Fit | Path, theirs: Fit | Path) -> None:
    """Assert that all logged numbers and all tensors of the last checkpoint are bit-identical."""
    one, two = (run.directory if isinstance(run, Fit) else run for run in (ours, theirs))
    assert [row["update"] for row in values(one)] == [row["update"] for row in values(two)]
    for rows in zip(values(one), values(two), strict=True):
        assert rows[0] == rows[1]
    assert_equal(state(one), state(two))


def assert_equal(one: object, two: object, where: str = "") -> None:
    """Assert bit-identical content, through containers and dataclasses."""
    if is_dataclass(one) and is_dataclass(two):
        one, two = vars(one), vars(two)
    if isinstance(one, torch.Tensor):
        assert isinstance(two, torch.Tensor), where
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert isinstance(two, dict), where
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, Sequence) and not isinstance(one, str):
        assert isinstance(two, Sequence), where
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert one == two, where
