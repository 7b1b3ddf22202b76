"""A pickle that runs a command."""

import os
from pathlib import Path


class Malice:
    """When unpickled, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.canary}",)
