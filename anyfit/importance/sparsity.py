"""Masks of single weights: the plain one-shot sparsity that every other method has to beat.

Papers: "The Emergence of Essential Sparsity in Large Pre-trained Models", arXiv 2306.03805 (all weights in one pool, by magnitude;
N:M along the inputs; chance as a control); "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695
(|w| times the norm of the input, compared within a row).

Differences from the papers, and why:

* A pool of all weights can empty a small matrix, so each keeps a floor.
* Magnitudes are compared between matrices by their first eight binary digits, in one pass over the network's files: how many stay in
  each matrix is then known without holding more than one. Of those alike each matrix keeps its share. Which ones stay in a
  matrix is decided by the numbers themselves, and the total is exact.
* Patterns say how many weights of a group are *kept*, where the papers' code says how many are zeroed.
* Chance keeps as many of each row.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from anyfit.importance.wanda import weight_scores
from anyfit.structure.masks import Mask

FLOOR = 0.05
"""Share of its weights that every matrix keeps of a pool, at least."""
_BINS, _SHIFT = 1 << 15, 16
"""Of a float32 without its sign: exponent and seven digits after the first."""


class Saliency(ABC):
    """How much single weights matter. Stateless. `pooled`: compared over the whole network, which only magnitudes are."""

    name: str
    pooled = False

    @abstractmethod
    def scores(self, weight: Tensor, moments: Tensor, name: str) -> Tensor:
        """(outputs, inputs), any type, of a matrix `weight` of that shape, by its parameter's name; `moments` (inputs, inputs)."""


class Magnitude(Saliency):
    name, pooled = "magnitude", True

    def scores(self, weight: Tensor, moments: Tensor, name: str) -> Tensor:
        return weight.abs()


class Wanda(Saliency):
    name = "wanda"

    def scores(self, weight: Tensor, moments: Tensor, name: str) -> Tensor:
        return weight_scores(weight, moments)


class Chance(Saliency):
    """The control: what is kept doesn't matter."""

    name = "random"

    def scores(self, weight: Tensor, moments: Tensor, name: str) -> Tensor:
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def masked(mask: Mask, scores: Tensor, kept: int | None) -> Tensor:
    """Which weights a mask keeps (True), by their scores (outputs, inputs). `kept`: how many in all, where that is known."""
    if mask.group is not None:
        return keep_of_group(scores, mask.keep, mask.group)
    return keep_uniform(scores, mask.density) if kept is None else keep_highest(scores.flatten(), kept).view_as(scores)


def pooled(matrices: Iterable[tuple[str, Tensor]], masks: Sequence[Mask]) -> dict[Mask, dict[str, int]]:
    """How many weights each matrix keeps where the largest of all matrices stay: round(density * weights) in all.

    `matrices`: (name, numbers of any shape), one in memory at a time.
    """
    found = {name: _histogram(numbers) for name, numbers in matrices}
    sizes = {name: int(histogram.sum()) for name, histogram in found.items()}
    return {mask: _counts(found, sizes, mask.density) for mask in masks}


def keep_uniform(scores: Tensor, density: float) -> Tensor:
    """A mask (True: kept) of the round(density * inputs) highest scores of every row (outputs, inputs)."""
    return keep_highest(scores, round(density * scores.shape[-1]))


def keep_of_group(scores: Tensor, keep: int, group: int) -> Tensor:
    """A mask (True: kept) of the `keep` highest scores in each `group` weights that lie side by side in a row (outputs, inputs)."""
    assert 0 <= keep <= group and scores.shape[-1] % group == 0, (keep, group, tuple(scores.shape))
    return keep_highest(scores.unflatten(-1, (-1, group)), keep).flatten(-2)


def keep_highest(scores: Tensor, number: int) -> Tensor:
    """A mask of the `number` highest along the last dimension; of equals the first."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :number]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, best, True)


def _histogram(numbers: Tensor) -> Tensor:
    """Magnitudes, the largest first, (bins,) int64."""
    bits = numbers.float().abs().flatten().view(torch.int32) >> _SHIFT
    return torch.bincount(bits, minlength=_BINS).flip(0)


def _counts(histograms: Mapping[str, Tensor], sizes: Mapping[str, int], density: float) -> dict[str, int]:
    """{matrix: weights kept}."""
    floors = {name: round(min(FLOOR, density) * size) for name, size in sizes.items()}
    left = round(density * sum(sizes.values())) - sum(floors.values())
    free = {name: _without(histogram, floors[name]) for name, histogram in histograms.items()}
    total = torch.stack(list(free.values())).sum(0).cumsum(0)
    last = int(torch.searchsorted(total, left))  # the first place at which so many or more were counted
    above = {name: int(histogram[:last].sum()) for name, histogram in free.items()}
    alike = {name: int(histogram[last]) if last < _BINS else 0 for name, histogram in free.items()}
    shares = _shared(left - sum(above.values()), alike)
    return {name: floors[name] + above[name] + shares[name] for name in sizes}


def _without(histogram: Tensor, number: int) -> Tensor:
    """What is left when the `number` largest are taken away."""
    before = histogram.cumsum(0) - histogram
    return (histogram - (number - before).clamp_min(0)).clamp_min(0)


def _shared(number: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """`number` as a sum of parts in proportion to the sizes, none larger than its size."""
    total, given, seen = sum(sizes.values()), dict.fromkeys(sizes, 0), 0
    assert 0 <= number <= total, (number, total)
    for name, size in sizes.items():
        given[name] = number * (seen + size) // total - number * seen // total if total else 0
        seen += size
    return given


MAGNITUDE, WANDA, CHANCE = Magnitude(), Wanda(), Chance()
