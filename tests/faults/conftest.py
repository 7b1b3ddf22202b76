"""Tiny training runs for the fault tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import Fit, Launcher


@pytest.fixture
def make_fit(launcher: Launcher, packed: Path, tmp_path: Path) -> Callable[..., Fit]:
    """Return a function that defines a run of the tiny recipe, by name and with overrides."""

    def make(name: str, *overrides: str) -> Fit:
        return Fit(launcher, tmp_path / name, (f"data.train={packed}", *overrides))

    return make


@pytest.fixture(scope="session")
def whole(launcher: Launcher, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """The undisturbed run for comparison; tests must not change it."""
    fit = Fit(launcher, tmp_path_factory.mktemp("whole") / "run", (f"data.train={packed}",))
    fit.finish()
    return fit
