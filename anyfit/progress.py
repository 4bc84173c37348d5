"""How a long run tells where it is: stages with a count, and remarks.

Whoever does long work takes a `Progress` and knows nothing of terminals. Everything goes to standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class Stage(Protocol):
    """One piece of work, while it runs."""

    def advance(self, n: int = 1, detail: str = "") -> None:
        """`n` more parts are done; `detail` names the one that comes next or was just finished."""


class Progress(Protocol):
    """Who calls: `fit`, `plan`, `export`, `evaluate`. Stages may be nested; a stage that raises is left open."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Stage]:
        """Work of `total` equal parts.

        >>> with Silent().stage("calibration", total=2) as stage:
        ...     stage.advance(detail="block 0")
        """

    def note(self, text: str) -> None:
        """A remark that should stay on the screen: a fallback, a choice made for the user."""


class Silent:
    """Says nothing. The default of every function of the Python interface."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        yield _Mute()

    def note(self, text: str) -> None:
        return None


class Plain:
    """One line for each finished stage: for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        began = time.monotonic()
        yield _Mute()
        self.note(_finished(name, total, began))

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Terminal:
    """A bar, the count, the part at hand and the time left for every open stage; a line for each finished one."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
        )
        self._bars: Bars = Progress(*columns, console=Console(file=stream), transient=True, speed_estimate_period=120)
        self._open = 0

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        if not self._open:
            self._bars.start()
        self._open += 1
        task, began = self._bars.add_task(name, total=total, detail=""), time.monotonic()
        try:
            yield _Bar(self._bars, task)
            self.note("✓ " + _finished(name, total, began))
        finally:
            self._bars.remove_task(task)
            self._open -= 1
            if not self._open:
                self._bars.stop()

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)


class _Mute:
    def advance(self, n: int = 1, detail: str = "") -> None:
        return None


class _Bar:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, n: int = 1, detail: str = "") -> None:
        self._bars.update(self._task, advance=n, detail=detail)


def to_stderr() -> Progress:
    """Bars where standard error is a terminal, one line a stage where it isn't."""
    return Terminal(sys.stderr) if sys.stderr.isatty() else Plain(sys.stderr)


def duration(seconds: float) -> str:
    """Time as a person reads it: `0.4 s`, `2 min 05 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _finished(name: str, total: int, began: float) -> str:
    return f"{name}: {total} in {duration(time.monotonic() - began)}"
