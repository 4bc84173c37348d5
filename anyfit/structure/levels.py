"""How much of an attention or a feed-forward is kept: the choices, and their names."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.core.config import HEADS, WIDTH
from anyfit.core.units import Weight
from anyfit.modeling_cut import spread

READERS = {"o": HEADS, "down": WIDTH}
"""The roles of the matrices that read what structures put out, and on which axis these are taken out."""
SHRINKING = 0.9
"""From one width to the next smaller, about."""
STEP, LARGE_STEP, NEAR = 32, 256, 0.05
"""Of which widths are multiples: what runtimes' blocks of weights and matrix products like. Blocks of llama.cpp's smaller types are the
larger one, so a multiple of that is taken where it is off by no more than a share of the width."""
_NAME = re.compile(f"(?:{HEADS}|{WIDTH})([0-9]+) (.+)")


@dataclass(frozen=True)
class Structure:
    """An attention or a feed-forward as pruning sees it. `reader`: the matrix whose columns are what its `num` structures put out,
    `size` neighbouring columns each: those of the query heads that share keys and values, or one channel. `rest`: its other matrices."""

    axis: str
    reader: Weight
    num: int
    size: int
    rest: tuple[Weight, ...]

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.reader, *self.rest

    def levels(self) -> list[int]:
        """The numbers of structures that may be kept, the most first, none last."""
        return [*(range(self.num, 0, -1) if self.axis == HEADS else widths(self.num)), 0]

    def choice(self, kept: int, format_: str) -> str:
        """The name of a choice."""
        return f"{self.axis}{kept} {format_}"


def widths(whole: int) -> list[int]:
    """Those of a feed-forward that are looked at, the whole first: a geometric ladder of multiples of steps, after ZipLM."""
    ladder, width = [whole], float(whole)
    while (width := width * SHRINKING) >= STEP:
        large = round(width / LARGE_STEP) * LARGE_STEP
        rounded = large if abs(large - width) <= NEAR * width else round(width / STEP) * STEP
        if rounded < ladder[-1]:
            ladder.append(rounded)
    return ladder


def kept_of(choice: str) -> int | None:
    """How many structures a choice keeps; None where it is about a format alone."""
    match = _NAME.fullmatch(choice)
    return int(match[1]) if match else None


def worded(choice: str) -> str:
    """A choice as a person reads it: of what nothing is kept, that it was removed."""
    return "removed" if kept_of(choice) == 0 else choice


def first(order: Tensor, kept: int) -> Tensor:
    """The structures that stay when so many are kept, in the order in which the network has them. `order`: those kept longest first."""
    return order[:kept].sort().values


def filled(level: Tensor, order: Tensor, columns: int) -> Tensor:
    """A level's matrix (outputs, kept columns) as the whole one (outputs, `columns`), with zeros for what was taken out; float32."""
    size = columns // len(order)
    whole = torch.zeros(level.shape[0], columns)
    whole[:, spread(first(order, level.shape[1] // size), size)] = level.float()
    return whole
