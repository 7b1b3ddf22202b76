"""Joint training on Lightning: module, stages, objective, checkpoints, metrics."""

from .module import CatModule

__all__ = ["CatModule"]
