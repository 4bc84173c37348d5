"""Where things go in a chart: axes, ticks and labels that don't cover each other. Lengths are SVG units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from matplotlib.ticker import Locator, LogLocator, MaxNLocator

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to lengths in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, *, log: bool = False) -> Axis:
        """An axis with some room on both sides of `values`, which are positive if it is logarithmic."""
        low, high = min(values), max(values)
        if log:
            room = max(0.06 * math.log(high / low), math.log(1.5))
            return cls(low / math.exp(room), high * math.exp(room), start, end, log=True)
        room = 0.06 * (high - low) or 0.1 * high
        return cls(max(low - room, 0.0), high + room, start, end)

    def at(self, value: float) -> float:
        """Where `value` is drawn, kept inside the axis and rounded to a tenth."""
        value = min(max(value, self.low), self.high)
        place = math.log if self.log else float
        share = (place(value) - place(self.low)) / (place(self.high) - place(self.low))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        if self.log:
            wide = self.high / self.low > 100
            locator: Locator = LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=20)
        else:
            locator = MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10])
        return [float(v) for v in locator.tick_values(self.low, self.high) if self.low <= v <= self.high]


def floored(values: Iterable[float]) -> Callable[[float], float]:
    """Lifts values onto a logarithmic axis: those that are not above zero go well below the least of the others."""
    floor = min((v for v in values if v > 0), default=1e-6) / 5
    return lambda value: value if value > 0 else floor


@dataclass(frozen=True)
class Label:
    """A text whose middle of the left edge is at (x, y)."""

    text: str
    x: float
    y: float


def place(marks: Iterable[tuple[str, float, float]], taken: Iterable[Box], width: float, em: float = 12) -> list[Label]:
    """One label beside each mark (text, x, y), clear of the `taken` boxes, of each other and of the right edge."""
    boxes, labels = list(taken), []
    for text, x, y in marks:
        length = 0.62 * em * len(text)
        spots = [(x + side, y + shift) for shift in _shifts(em) for side in (9, -9 - length)]
        candidates = [(left, top, (left, top - em / 2, left + length, top + em / 2)) for left, top in spots]
        inside = [c for c in candidates if c[0] >= 0 and c[2][2] <= width]
        left, top, box = min(inside or candidates, key=lambda c: sum(_overlap(c[2], other) for other in boxes))
        boxes.append(box)
        labels.append(Label(text, round(left, 1), round(top, 1)))
    return labels


def _shifts(em: float) -> list[float]:
    steps = [0.0]
    for n in range(1, 5):
        steps += [-n * 0.75 * em, n * 0.75 * em]
    return steps


def _overlap(a: Box, b: Box) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return across * down if across > 0 and down > 0 else 0.0
