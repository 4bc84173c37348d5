"""How much of an attention or a feed-forward is kept: the choices, and their names."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.core.config import HEADS, WIDTH
from anyfit.core.units import Weight
from anyfit.modeling_cut import spread

SHRINKING = 0.9
"""From one width to the next smaller, about."""
STEP = 32
"""Of which widths are multiples: what runtimes' blocks of weights and matrix products like."""
_NAME = re.compile(f"({HEADS}|{WIDTH})([0-9]+)")


@dataclass(frozen=True)
class Structure:
    """An attention or a feed-forward as pruning sees it. `reader`: the matrix whose columns are what its `num` structures put out,
    `size` neighbouring columns each: those of the query heads that share keys and values, or one channel."""

    axis: str
    reader: Weight
    num: int
    size: int

    def levels(self) -> dict[str, int]:
        """{choice: structures kept}, the most first, none last."""
        sizes = range(self.num, 0, -1) if self.axis == HEADS else widths(self.num)
        return {f"{self.axis}{kept}": kept for kept in (*sizes, 0)}


def widths(whole: int) -> list[int]:
    """Those of a feed-forward that are looked at, the whole first: a geometric ladder of multiples of `STEP`, after ZipLM."""
    ladder, width = [whole], float(whole)
    while (width := width * SHRINKING) >= STEP:
        rounded = round(width / STEP) * STEP
        if rounded < ladder[-1]:
            ladder.append(rounded)
    return ladder


def kept_of(choice: str) -> int:
    """How many structures a choice keeps."""
    match = _NAME.fullmatch(choice)
    assert match is not None, choice
    return int(match[2])


def is_level(choice: str) -> bool:
    """Whether a choice is about structure, not about a format."""
    return _NAME.fullmatch(choice) is not None


def filled(stored: Tensor, order: Tensor, columns: int) -> Tensor:
    """A level's matrix (outputs, kept columns), its columns in the order of the structures, as the whole one (outputs, `columns`), with
    zeros for what was taken out; float32."""
    size = columns // len(order)
    places = spread(order[: stored.shape[1] // size], size)
    whole = torch.zeros(stored.shape[0], columns)
    whole[:, places] = stored.float()
    return whole
