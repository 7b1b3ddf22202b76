"""What all tests share: real recordings, packed once, and one prepared process from which command lines are forked."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test waits for a network
# oneDNN's AMX convolutions of bfloat16 read memory that nobody wrote when channels do not fill a tile.
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
    """Measure processor time if that is wanted, in every process of pytest-xdist."""
    if config.getoption("--cpu-seconds"):
        config.pluginmanager.register(CpuSeconds())


class CpuSeconds:
    """Processor time of every test, with the programs it started and waited for; other work on the machine adds little.

    What the launcher forked is added to the last test of the process, when the launcher ends.
    """

    def pytest_collection_finish(self) -> None:
        """Begin after the imports."""
        self.last = sum(os.times()[:4])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator:
        """Note what was used since the last report."""
        report = yield
        before, self.last = self.last, sum(os.times()[:4])
        report.user_properties.append(("cpu_seconds", self.last - before))
        return report

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the files, the longest first."""
        files: dict[str, float] = {}
        for report in (report for kind in terminalreporter.stats.values() for report in kind):
            seconds = dict(getattr(report, "user_properties", ())).get("cpu_seconds", 0.0)
            file = getattr(report, "nodeid", "").partition("::")[0]
            files[file] = files.get(file, 0.0) + seconds
        terminalreporter.write_sep("=", f"processor time: {sum(files.values()):.0f} s")
        for file, seconds in sorted(files.items(), key=lambda item: -item[1]):
            if seconds >= 1:
                terminalreporter.write_line(f"{seconds:7.1f} s  {file}")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave nightly tests out unless `-m` names them; mark tests whose fixtures start command lines."""
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
    """The shipped configuration of `pack`, with the changes it is called with."""
    return _config


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a command in this process that ends with an error; return the one line that it prints on stderr."""

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
    """The quick start's training manifest as shards, small ones so that there are several per domain."""
    out = tmp_path_factory.mktemp("packed") / "train"
    config = _config(input=RECORDINGS / "train.jsonl", out=out, shard_bytes=300_000)
    assert pack_command.run(config) == 0
    return out


@pytest.fixture(scope="module")
def open_browser() -> Iterator[Callable[..., Any]]:
    """Opens a headless Chromium, that of the system, with further arguments: Playwright's own would be a download."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        assert "CI" not in os.environ, "continuous integration has to look at pages in a browser"
        pytest.skip("there is no chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started, ExitStack() as stack:

        def launch(*arguments: str) -> Any:
            # The sandbox refuses to run as root; /dev/shm of a container is too small.
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
    """Starts command lines without the seconds that a fresh interpreter takes to import them."""
    launcher = Launcher(tmp_path_factory.mktemp("logs"))
    yield launcher
    launcher.close()
