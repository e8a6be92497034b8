"""Threads for arithmetic that lets go of Python's lock: NumPy's casts, products and random numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
MOST = 4
"""Threads at most: each holds blocks of its own, and memory is bounded (architecture, "Memory follows what is read")."""


@contextmanager
def ordered(work: int, least: int = 2**20) -> Iterator[Each]:
    """`map` on threads: results in the order of the items, so a sum over them does not hang on who was first.

    `work`: values to be read in all; below `least` it is plain `map`, for threads take time to start.

    >>> with ordered(10) as each:
    ...     list(each(abs, [-1, 2]))
    [1, 2]
    """
    if work < least:
        yield map
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(MOST, cores)) as pool:
        yield pool.map
