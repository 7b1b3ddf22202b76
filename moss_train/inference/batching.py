"""Groups clips of similar length, and reads the next group while the model works on this one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

SHORTEST_SHARE = 0.7  # of the longest clip of a group, so that little of the work is padding
NUM_READERS = 4


def group_by_length(items: Sequence[Item], lengths: Sequence[float], limit: float) -> list[list[Item]]:
    """Group items so that count x longest stays within `limit` and lengths are similar; the longest groups come first.

    An item above the limit forms a group of its own. Longest first, so that too little memory shows at the start.
    """
    order = sorted(range(len(items)), key=lambda index: -lengths[index])
    groups: list[list[Item]] = []
    longest = 0.0
    for index in order:
        full = not groups or (len(groups[-1]) + 1) * longest > limit or lengths[index] < SHORTEST_SHARE * longest
        if full:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(items[index])
    return groups


def read_ahead(
    groups: Iterable[Sequence[Item]], read: Callable[[Item], Value]
) -> Iterator[list[tuple[Item, Value | Exception]]]:
    """Yield each group's items with what `read` returned, or the ValueError or OSError it raised.

    One group is read ahead in threads, so that files are decoded while the caller computes.
    """
    with ThreadPoolExecutor(NUM_READERS) as pool:
        waiting: list[tuple[Item, Future[Value]]] | None = None
        for group in groups:
            submitted = [(item, pool.submit(read, item)) for item in group]
            if waiting is not None:
                yield [(item, _outcome(future)) for item, future in waiting]
            waiting = submitted
        if waiting is not None:
            yield [(item, _outcome(future)) for item, future in waiting]


def _outcome(future: Future[Any]) -> Any:
    try:
        return future.result()
    except (ValueError, OSError) as error:
        return error
