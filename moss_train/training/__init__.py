"""Joint training on Lightning: module, stages, objective, checkpoints, metrics."""

from .module import CatModule, update_result

__all__ = ["CatModule", "update_result"]
