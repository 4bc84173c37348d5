"""Where encoding runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from numba import config

from anyfit.devices import CPU
from anyfit.formats.threads import alone

MOST_WORKERS = 8
"""Each holds some pieces of matrices, so that their number counts in memory."""
NUM_DRIVERS = 3
"""Workers that share a graphics processor: while it rounds for one, scales are searched for another."""

T = TypeVar("T")
R = TypeVar("R")


def one_thread() -> ThreadPoolExecutor:
    """A worker that computes with one thread, whatever torch uses elsewhere.

    Compiled loops share their rows out to threads themselves; what is left are small operations, which lose more by being
    split than they gain. And so the bytes of the variants don't depend on the number of threads.
    """
    return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))


def num_workers(device: torch.device) -> int:
    """How many there are where encoding runs on a device."""
    return min(MOST_WORKERS, config.NUMBA_NUM_THREADS) if device.type == "cpu" else NUM_DRIVERS


class Workers:
    """Threads that each compute alone, on pieces of their own: the same results, whatever their number.

    As many as the environment's NUMBA_NUM_THREADS says, or as there are processors, up to `MOST_WORKERS`. On a graphics processor
    a few, which would be in each other's way if they were more, and what is left to the processors is shared out to them all.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        by_itself = device.type == "cpu"
        self.number = num_workers(device)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.number, initializer=_begin, initargs=(by_itself,))

    def map(self, work: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
        """The results in order. Pieces are made and results kept no further ahead than the workers need."""
        waiting: deque[Future[R]] = deque()
        for piece in pieces:
            waiting.append(self._pool.submit(work, piece))
            if len(waiting) > self.number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # the workers' own number is also that of threads begun later


def _begin(by_itself: bool) -> None:
    torch.set_num_threads(1)
    if by_itself:
        alone()
