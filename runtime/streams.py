"""Streams: several batches in flight at once, each on threads of its own.

A batch on all threads has a barrier after every operation, where each waits for the slowest. Beside
other processes a thread often waits for a core, and the rest for it. Streams need no barriers.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")


@cache
def workers(streams: int, threads: int) -> ThreadPoolExecutor:
    """Return `streams` workers, each of which computes with `threads` threads."""
    return ThreadPoolExecutor(streams, "stream", torch.set_num_threads, (threads,))


def in_streams(
    function: Callable[[Item], Result], items: Iterable[Item], streams: int
) -> Iterator[Result]:
    """Yield the result for each item, in order; `streams` of them are computed at once."""
    if streams == 1:
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    try:
        yield from workers(streams, max(1, threads // streams)).map(function, items)
    finally:
        torch.set_num_threads(threads)  # else threads that start later would have a worker's number
