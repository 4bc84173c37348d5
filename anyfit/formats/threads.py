"""Rows shared out to threads.

Compiled loops over rows hold no lock of Python's, so that plain threads run them side by side. Numba's own parallel
loops would too, but where it finds neither TBB nor OpenMP they end the process when two threads start them at once,
and they take several times as long to compile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from numba import config


def each(work: Callable[[slice], None], rows: int, at_least: int, most: int | None = None) -> None:
    """Call `work` with consecutive parts of `rows` rows, `at_least` and (but for that) at most `most` each, in any order.

    No part may depend on another. As many threads as the environment's NUMBA_NUM_THREADS says, or as there are processors;
    only this one where `alone` was said.
    """
    threads = 1 if getattr(_local, "alone", False) else config.NUMBA_NUM_THREADS
    parts = max(1, min(threads, rows // at_least))
    if most is not None:
        parts = max(parts, -(-rows // max(most, at_least)))
    slices = [slice(rows * i // parts, rows * (i + 1) // parts) for i in range(parts)]
    if parts == 1 or threads == 1:
        for part in slices:
            work(part)
    else:
        list(_pool(threads).map(work, slices))


def alone() -> None:
    """From now on this thread shares nothing out: it is one of several that work side by side."""
    _local.alone = True


_local = threading.local()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="rows")
