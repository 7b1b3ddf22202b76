"""Tiny runs to damage."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import Fit, Launcher


@pytest.fixture
def make_fit(launcher: Launcher, packed: Path, tmp_path: Path) -> Callable[..., Fit]:
    """A run of the tiny recipe under a name, with further overrides."""

    def make(name: str, *overrides: str) -> Fit:
        return Fit(launcher, tmp_path / name, (f"data.train={packed}", *overrides))

    return make


@pytest.fixture(scope="session")
def whole(launcher: Launcher, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """The run that nothing happened to; tests leave it as it is."""
    fit = Fit(launcher, tmp_path_factory.mktemp("whole") / "run", (f"data.train={packed}",))
    fit.finish()
    return fit
