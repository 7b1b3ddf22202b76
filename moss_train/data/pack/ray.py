"""The same work on a Ray cluster (extra `cluster`): every machine needs the input under the same path."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moss_train.utils.errors import UserError
from moss_train.utils.workers import Submit

EXECUTORS = ("local", "ray")


class _RayResult:
    """What `submit` returns: as much of a Future as `ordered` uses."""

    def __init__(self, reference: Any, get: Callable[[Any], Any]) -> None:
        self._reference, self._get = reference, get

    def result(self) -> Any:
        """Wait for the result; raises what the task raised."""
        return self._get(self._reference)


@contextmanager
def ray_pool(num_gpus: int = 0) -> Iterator[tuple[Submit, int]]:
    """Give a `submit` for the cluster of RAY_ADDRESS, or one on this machine, and how many tasks run at once.

    A task takes one core, or `num_gpus` GPUs, which it sees as its first.
    Raises UserError when Ray is not installed or the cluster does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("executor=ray needs Ray: pip install 'moss_train[cluster]'") from error
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS"),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: no Ray cluster there ({error})") from error
    call = ray.remote(num_cpus=0 if num_gpus else 1, num_gpus=num_gpus, max_retries=3)(_call)

    def submit(function: Callable[..., Any], *arguments: Any) -> Any:
        return _RayResult(call.remote(function, *arguments), ray.get)

    try:
        yield submit, max(1, int(ray.cluster_resources().get("GPU" if num_gpus else "CPU", 1)))
    finally:
        ray.shutdown()


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    return function(*arguments)
