"""Where files that belong to the package lie, in a wheel and in a checkout."""

from pathlib import Path

PACKAGE_DIRECTORY = Path(__file__).resolve().parent.parent


def config_directory() -> Path:
    """Return the folder of the Hydra configs: inside the package in a wheel, at the repository root in a checkout.

    Raises:
        FileNotFoundError: neither folder exists, so the installation is incomplete.
    """
    candidates = (PACKAGE_DIRECTORY / "configs", PACKAGE_DIRECTORY.parent / "configs")
    for directory in candidates:
        if directory.is_dir():
            return directory
    raise FileNotFoundError(f"no configs folder at {candidates[0]} or {candidates[1]}; install moss_train again")
