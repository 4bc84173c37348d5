"""What the system has, and giving back what isn't needed."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_LARGE = 1 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""As malloc.h has them."""


def release() -> None:
    """Return freed memory to the system: the C library keeps blocks of up to 32 MB for later, where its lists get fragmented."""
    library = _library()
    if library is not None:
        library.malloc_trim(0)


def return_at_once() -> None:
    """From now on, return whatever is larger than `_LARGE` to the system once it is freed, whatever the C library has learnt to keep. Costs
    time, as the next one has to be mapped again: for what comes and goes in large blocks, of many sizes, among others that stay."""
    library = _library()
    if library is not None:
        for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            library.mallopt(parameter, _LARGE)


@cache
def _library() -> Any | None:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):  # not a system with glibc
        return None


_GROUP = Path("/sys/fs/cgroup")


class Peak:
    """The most memory that this process has held since the object was made, in bytes.

    Linux starts counting anew; elsewhere, and where that isn't allowed, it is the most of the process's whole life.
    """

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def bytes_(self) -> int:
        try:
            return _status("VmHWM")
        except (OSError, StopIteration):
            unit = 1 if sys.platform == "darwin" else 1024
            return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free() -> int | None:
    """Bytes that this process could still take without others giving way; None where the system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration):
        return None
    return min([free, *_allowed()])


def _allowed() -> Iterator[int]:
    """What is left of the limit of the control group, in a container. Pages of files that were read give way, so they are free."""
    with suppress(OSError, ValueError, KeyError):
        held = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        files = int(held["active_file"]) + int(held["inactive_file"])
        yield int((_GROUP / "memory.max").read_text()) - int((_GROUP / "memory.current").read_text()) + files


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{entry}:")).split()[1])
