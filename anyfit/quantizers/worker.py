"""Where encoding runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def one_thread() -> ThreadPoolExecutor:
    """A worker that computes with one thread, whatever torch uses elsewhere.

    Compiled loops share their rows out to threads themselves; what is left are small operations, which lose more by being
    split than they gain. And so the bytes of the variants don't depend on the number of threads.
    """
    return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
