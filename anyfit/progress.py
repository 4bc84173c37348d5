"""How a long run tells where it is: stages with a count, and remarks.

Whoever does long work takes a `Progress` and knows nothing of terminals. Everything goes to standard error.
"""

from __future__ import annotations

import json
import math
import os
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


class JsonLines:
    """One JSON document a line, for machines: where a stage is, at most once in `EVERY` seconds, and remarks.

    {"stage": "encode", "done": 3, "total": 12, "seconds": 4.2, "left": 12.6, "detail": "model.layers.0..."}; `left` is null before anything
    is done, and doesn't count what was prepared by then.
    """

    EVERY = 1.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        lines = _Lines(self, name, total)
        lines.tell()
        yield lines
        lines.done = total
        lines.tell()

    def note(self, text: str) -> None:
        self.tell({"note": text})

    def tell(self, document: dict[str, object]) -> None:
        print(json.dumps(document, ensure_ascii=False), file=self._stream, flush=True)


class _Lines:
    def __init__(self, log: JsonLines, name: str, total: int) -> None:
        self._log, self._name, self._total = log, name, total
        self._began, self._told = time.monotonic(), -math.inf
        self._paced = self._began
        self.done = 0

    def advance(self, n: int = 1, detail: str = "") -> None:
        if not n and not self.done:
            self._paced = time.monotonic()  # it was preparation
        self.done += n
        if time.monotonic() - self._told >= JsonLines.EVERY:
            self.tell(detail)

    def tell(self, detail: str = "") -> None:
        self._told = time.monotonic()
        left = (self._told - self._paced) / self.done * (self._total - self.done) if self.done else None
        figures = {"done": self.done, "total": self._total, "seconds": round(self._told - self._began, 3), "left": left and round(left, 3)}
        self._log.tell({"stage": self._name, **figures, "detail": detail})


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


def to_stderr(*, as_json: bool = False) -> Progress:
    """Bars where standard error is a terminal, one line a stage where it isn't, JSON where that is asked.

    Of several processes only the first speaks.
    """
    if not speaks():
        return Silent()
    if as_json:
        return JsonLines(sys.stderr)
    return Terminal(sys.stderr) if sys.stderr.isatty() else Plain(sys.stderr)


def speaks() -> bool:
    """Whether this process is the only one of a run, or the first that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def duration(seconds: float) -> str:
    """Time as a person reads it: `0.4 s`, `2 min 05 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _finished(name: str, total: int, began: float) -> str:
    return f"{name}: {total} in {duration(time.monotonic() - began)}"
