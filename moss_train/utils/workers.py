"""Worker processes on this machine (pools that end with their parent) or on a Ray cluster; results come in order.

On a Ray cluster (extra `cluster`) every machine needs the input under the same path.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from moss_train.utils.errors import UserError

OrderedMap = Callable[..., Iterator[tuple[Any, Any]]]
"""Called as `(function, tasks, *args)`, yields every task with `function(task, *args)` in the order of the tasks."""

TASKS_PER_PROCESS = 3  # submitted ahead for each process, so that none idles while another has a long task


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def init_loader_worker(worker: int) -> None:
    """Limit a forked worker to one thread (more would compete), and end it with its parent, even a killed one.

    torch's own watchdog waits until a worker's results are read, which never happens after the parent was killed.

    A cluster that preempts a machine signals every process. The parent then needs its workers to finish its work, so a
    worker ends on SIGTERM from its parent only.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def end_when_told() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=end_when_told, daemon=True).start()
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()


def exit_with_parent(parent: int) -> None:
    """Wait until the process `parent` is gone, and end this one at once; to be run in a thread."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


@contextmanager
def worker_pool(
    num_workers: int,
    preload: str,
    setup: Callable[[int], None] | None = None,
    num_threads: int | None = 1,
) -> Iterator[OrderedMap]:
    """Yield a map over `num_workers` processes; with 0, tasks run in this process, one at a time.

    The processes are forked from a clean one that has imported `preload`, never from this one, which has threads.
    Ctrl-C ends this process, which ends them; they also end if this one is killed. Raises OSError if a process ends
    abruptly, as it does when the system runs out of memory.

    Args:
        setup: called first in every process, with its number from 0.
        num_threads: torch's threads in each process; None for torch's default.
    """
    if num_workers == 0:
        if setup is not None:
            setup(0)
        yield lambda function, tasks, *args: ((task, function(task, *args)) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    arguments = (context.Value("i", 0), setup, num_threads)
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_pool_worker, initargs=arguments)
    try:
        yield partial(_map_ordered, pool.submit, TASKS_PER_PROCESS * num_workers)
    except BrokenProcessPool as error:
        raise OSError("a worker process ended abruptly, most likely for lack of memory; use fewer workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_pool_worker(counter: Any, setup: Callable[[int], None] | None, num_threads: int | None) -> None:
    # The direct parent of a worker is the fork server; the worker has to end with the process that started the pool.
    starter = multiprocessing.parent_process()
    assert starter is not None

    def end_with_starter() -> None:
        starter.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_starter, daemon=True).start()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if setup is not None:
        setup(number)


def _map_ordered(
    submit: Callable[..., Any], max_in_flight: int, function: Callable[..., Any], tasks: Iterable[Any], *args: Any
) -> Iterator[tuple[Any, Any]]:
    waiting: deque[tuple[Any, Any]] = deque()  # at most `max_in_flight`
    for task in tasks:
        waiting.append((task, submit(function, task, *args)))
        if len(waiting) >= max_in_flight:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


@contextmanager
def ray_pool(num_workers: int | None = None, num_gpus: int = 0) -> Iterator[OrderedMap]:
    """Yield a map over the Ray cluster at RAY_ADDRESS, or on this machine; a task takes one core, or `num_gpus` GPUs.

    A task's GPU is device 0 in its process. `num_workers` is the number of tasks expected to run at once, None for as
    many as the cluster can run. Raises UserError if Ray is not installed or the cluster does not answer.
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

    @ray.remote(num_cpus=0 if num_gpus else 1, num_gpus=num_gpus, max_retries=3)
    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        torch.set_num_threads(1)
        return function(*arguments)

    def submit(function: Callable[..., Any], *arguments: Any) -> Any:
        # The part of a Future's interface that `_map_ordered` uses.
        return SimpleNamespace(result=partial(ray.get, call.remote(function, *arguments)))

    try:
        num_workers = num_workers or max(1, int(ray.cluster_resources().get("GPU" if num_gpus else "CPU", 1)))
        yield partial(_map_ordered, submit, TASKS_PER_PROCESS * num_workers)
    finally:
        ray.shutdown()
