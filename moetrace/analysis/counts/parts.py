"""The same work on many parts of recordings: here, or in an executor's processes, wherever those are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol, TypeVar

#: parts are handed out in about so many blocks: of many small ones each costs a journey
_BLOCKS = 64
#: blocks that are handed out at a time, beyond those whose turn it is: what is done early waits in memory
_AHEAD = 16

P = TypeVar("P")
R = TypeVar("R")


class Adds(Protocol):
    """What can be added up."""

    def __add__(self, other: Any, /) -> Any: ...


A = TypeVar("A", bound=Adds)


def each(function: Callable[[P], R], parts: Sequence[P], executor: Executor | None = None) -> Iterator[R]:
    """``function`` of every part, in their order.

    With an executor (of ``concurrent.futures``, or Dask's) it works on blocks of parts where the executor's processes
    are: the function, the parts and what it gives are pickled; what it raises is raised here.
    """
    if executor is None:
        yield from map(function, parts)
        return
    for block in _ahead(executor, _all, function, parts):
        yield from block


def total(function: Callable[[P], A], parts: Sequence[P], executor: Executor | None = None) -> A:
    """The sum of ``function`` of every part, of one or more.

    Halves are added first, so that each is added to one of its size; blocks are summed where they are counted.
    """
    if executor is None:
        return added([function(part) for part in parts])
    waiting: list[tuple[int, A]] = []  # sums of 1, 2, 4, ... blocks, as few as there are
    for found in _ahead(executor, _summed, function, parts):
        size = 1
        while waiting and waiting[-1][0] == size:
            found, size = waiting.pop()[1] + found, 2 * size
        waiting.append((size, found))
    return added([found for _, found in waiting])


def added(parts: list[A]) -> A:
    """All of them, halves first."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    out: A = added(parts[:half]) + added(parts[half:])
    return out


def _ahead(
    executor: Executor, work: Callable[..., Any], function: Callable[[P], Any], parts: Sequence[P]
) -> Iterator[Any]:
    size = -(-len(parts) // _BLOCKS)
    running: deque[Any] = deque()
    try:
        for start in range(0, len(parts), max(size, 1)):
            running.append(executor.submit(work, function, list(parts[start : start + size])))
            if len(running) > _AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _all(function: Callable[[P], R], parts: Sequence[P]) -> list[R]:
    return [function(part) for part in parts]


def _summed(function: Callable[[P], A], parts: Sequence[P]) -> A:
    return added([function(part) for part in parts])
