"""How large the numbers of an input are, and the grid of 8 bits on which they lose least."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from anyfit.activations import HIGHEST, Static
from anyfit.distributed import Group

BINS = 1 << 14
"""Of float32 numbers, by their upper bits: sign, exponent, and five of the mantissa. So a bin's edges are 3 % apart, whatever comes."""
_DROPPED = 18
_SHARES = np.geomspace(1, 1 / 32, 41)
"""Ends of grids that are tried, as shares of the largest and the least number."""


@dataclass
class Spread:
    """Of the numbers that were seen. `counts` (BINS,) int64: of a text's own numbers. `ranges`: of each segment the least and the largest
    number, and 0 if it isn't between them; padding counts, as it does for who rounds a whole segment."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    ranges: list[tuple[float, float]] = field(default_factory=list)

    def add(self, segments: Tensor, own: Tensor) -> None:
        """What a batch of segments reads, (segments, ..., columns), and those of these vectors that are no padding, (vectors, columns)."""
        numbers = segments.detach().float().flatten(1)
        low, high = numbers.amin(1).clamp_max(0), numbers.amax(1).clamp_min(0)
        self.ranges += zip(low.tolist(), high.tolist(), strict=True)
        places = own.detach().float().contiguous().flatten().view(torch.int32).bitwise_right_shift(_DROPPED).bitwise_and(BINS - 1)
        self.counts += places.bincount(minlength=BINS).cpu()

    def add_up(self, group: Group) -> None:
        """Over all processes."""
        parts = group.gathered((self.counts, self.ranges))
        self.counts = torch.stack([counts for counts, _ in parts]).sum(0)
        self.ranges = [row for _, ranges in parts for row in ranges]

    @property
    def dynamic_error(self) -> float:
        """Mean squared error of a number on its segment's own grid: a twelfth of the squared step."""
        return math.fsum((high - low) ** 2 for low, high in self.ranges) / (12 * HIGHEST**2 * len(self.ranges))

    @cached_property
    def grid(self) -> tuple[Static, float]:
        """The grid for all segments with the least mean squared error, and that: what lies beyond its ends is cut off there. To be asked
        for when all has been seen.

        Tried are all pairs of a share of the least number and one of the largest.
        """
        seen = self.counts.nonzero().flatten()
        # A bin stands for the number in its middle.
        middles = ((seen.int() << _DROPPED) | (1 << (_DROPPED - 1))).view(torch.float32).double().numpy()
        counts = self.counts[seen].double().numpy()
        least, largest = min(low for low, _ in self.ranges), max(high for _, high in self.ranges)
        found, error = Static(1.0, 0), math.inf if least < largest else 0.0
        for low in least * _SHARES if least < 0 else (0.0,):
            for high in largest * _SHARES if largest > 0 else (0.0,):
                if not low < high:
                    continue
                scale = float(np.float32((high - low) / HIGHEST))
                zero = round(-low / scale)
                rounded = np.clip(np.rint(middles / scale), -zero, HIGHEST - zero) * scale
                mean = float(counts @ (middles - rounded) ** 2 / counts.sum())
                if mean < error:
                    found, error = Static(scale, zero), mean
        return found, error
