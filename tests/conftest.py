"""Shared fixtures: real recordings, packed once, and a process with all imports done from which commands are forked."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"  # has to be set before huggingface_hub is imported: no test waits for a network
# oneDNN's bfloat16 AMX convolutions read uninitialized memory if channels do not fill a tile.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

from moss_train.cli.main import main
from moss_train.commands import pack as pack_command
from moss_train.config.schema import PackConfig

from .faults.harness import Launcher

ROOT = Path(__file__).parents[1]
RECORDINGS = ROOT / "recipes" / "quickstart" / "audio"


PROCESS_FIXTURES = {"launcher", "start", "open_browser"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--cpu-seconds`."""
    parser.addoption("--cpu-seconds", action="store_true", help="show the processor time of every test file")


def pytest_configure(config: pytest.Config) -> None:
    """Measure processor time if requested, in every process of pytest-xdist."""
    if config.getoption("--cpu-seconds"):
        config.pluginmanager.register(CpuSeconds())


class CpuSeconds:
    """Reports the processor time of every test, including its finished child processes; robust to other load.

    The time of commands forked by the launcher is added to the last test of the process, when the launcher ends.
    """

    def pytest_collection_finish(self) -> None:
        """Start measuring after the imports."""
        self.last = sum(os.times()[:4])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator:
        """Record the time since the last report."""
        report = yield
        before, self.last = self.last, sum(os.times()[:4])
        report.user_properties.append(("cpu_seconds", self.last - before))
        return report

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the files, slowest first."""
        files: dict[str, float] = {}
        for report in (report for kind in terminalreporter.stats.values() for report in kind):
            seconds = dict(getattr(report, "user_properties", ())).get("cpu_seconds", 0.0)
            file = getattr(report, "nodeid", "").partition("::")[0]
            files[file] = files.get(file, 0.0) + seconds
        terminalreporter.write_sep("=", f"processor time: {sum(files.values()):.0f} s")
        for file, seconds in sorted(files.items(), key=lambda item: -item[1]):
            if seconds >= 1:
                terminalreporter.write_line(f"{seconds:7.1f} s  {file}")


@pytest.hookimpl(tryfirst=True)  # runs before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip nightly tests unless `-m` names them, and mark tests whose fixtures start commands."""
    left_out = []
    for item in items:
        if PROCESS_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("processes")
        if item.get_closest_marker("nightly") and "nightly" not in config.option.markexpr:
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _config(**changes: Any) -> PackConfig:
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    return PackConfig.parse(yaml.safe_load((ROOT / "configs" / "pack.yaml").read_text()) | plain)


@pytest.fixture(scope="session")
def pack_config() -> Callable[..., PackConfig]:
    """Return a function that builds the shipped configuration of `pack` with overrides."""
    return _config


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a command in this process that must fail, and return the single line that it prints on stderr."""

    def run(arguments: Sequence[str], status: int = 2) -> str:
        assert main(list(arguments)) == status
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
        return error.strip()

    return run


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Folder of real recordings: speech, sound and music as FLAC at 24 kHz."""
    return RECORDINGS


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack the quickstart's training manifest into small shards, so that every domain has several."""
    out = tmp_path_factory.mktemp("packed") / "train"
    config = _config(input=RECORDINGS / "train.jsonl", out=out, shard_bytes=300_000)
    assert pack_command.run(config) == 0
    return out


@pytest.fixture(scope="module")
def open_browser() -> Iterator[Callable[..., Any]]:
    """Open a headless Chromium, with extra arguments. It is the system's; Playwright's would have to be downloaded."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        assert "CI" not in os.environ, "continuous integration has to look at pages in a browser"
        pytest.skip("there is no chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started, ExitStack() as stack:

        def launch(*arguments: str) -> Any:
            # The sandbox does not work for root, and /dev/shm is too small in containers.
            usual = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
            opened = started.chromium.launch(executable_path=program, args=[*usual, *arguments])
            stack.callback(opened.close)
            return opened

        yield launch


@pytest.fixture(scope="module")
def browser(open_browser: Callable[..., Any]) -> Any:
    """A headless Chromium."""
    return open_browser()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Start commands without waiting seconds for a fresh interpreter and its imports."""
    launcher = Launcher(tmp_path_factory.mktemp("logs"))
    yield launcher
    launcher.close()
