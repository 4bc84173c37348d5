"""Masks of single weights: which shares and patterns there are, what such choices are called, and the space of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from anyfit.core.budget import WEIGHTS
from anyfit.core.config import FORMAT, SPARSITY, Config, format_of
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Weight

SHARES = (90, 80, 70, 60, 50, 40, 30)
"""Percent of the weights that are kept."""
PATTERNS = ((2, 4), (4, 8), (1, 2))
"""(kept, of so many that lie side by side in a row)."""
PERCENT = 100
_NAME = re.compile(r"([a-z_]+)([0-9]+)(%|of[0-9]+) (\S+)")


@dataclass(frozen=True)
class Mask:
    """The weights of highest `score` are kept: `keep` of every `group` that lie side by side in a row, or `keep` percent of a matrix
    or of all, where `group` is None."""

    score: str
    keep: int
    group: int | None = None

    @property
    def density(self) -> float:
        return self.keep / (self.group or PERCENT)

    def __str__(self) -> str:
        """Without the score."""
        return f"{self.keep}%" if self.group is None else f"{self.keep}of{self.group}"

    def choice(self, format_: str) -> str:
        """The name of a choice."""
        return f"{self.score}{self} {format_}"

    def refuses(self, columns: int) -> str | None:
        """Why rows of this length can't have it; None where they can."""
        if self.group and columns % self.group:
            return f"row length {columns} is not a multiple of {self.group}"
        return None

    def holds(self, matrix: Tensor) -> bool:
        """Whether a matrix (outputs, inputs) has the zeros that a pattern promises, or any at all where this is none."""
        if self.group is None:
            return not bool((matrix != 0).all())
        return bool(((matrix != 0).unflatten(1, (-1, self.group)).sum(-1) <= self.keep).all())


def mask_of(choice: str) -> Mask | None:
    """What a choice leaves; None where it is about a format alone."""
    match = _NAME.fullmatch(choice)
    if match is None:
        return None
    return Mask(match[1], int(match[2]), None if match[3] == "%" else int(match[3].removeprefix("of")))


def menu(scores: Iterable[str]) -> Iterator[Mask]:
    """All that are looked at."""
    for score in scores:
        yield from (Mask(score, share) for share in SHARES)
        yield from (Mask(score, keep, group) for keep, group in PATTERNS)


def space(dense: Space, scores: Iterable[str], counts: Mapping[Mask, Mapping[str, int]]) -> Space:
    """A space in which every matrix in the blocks may be masked.

    `dense`: that of one floating-point format. Zeros take as many bytes there as any number, so that bytes are the same for all; what
    is counted besides is the weights in the blocks that are kept. `counts`: {mask: {matrix: weights}} of masks for which that isn't a
    share of each row.
    """
    return replace(dense, decisions=tuple(_decision(d, list(scores), counts) for d in dense.decisions), others={WEIGHTS: 0.0})


def plain(masked: Space, config: Config) -> tuple[Space, Config]:
    """The space of formats in which a config of masks is one, as targets write it, and that config."""
    formats = {unit: format_of(name) for unit, name in config.chosen.items()}
    decisions = tuple(
        replace(d, axis=FORMAT, choices=tuple(replace(c, others={}) for c in d.choices if mask_of(c.name) is None))
        for d in masked.decisions
    )
    return replace(masked, decisions=decisions, others={}), Config.of_formats(formats)


def pack(mask: Tensor) -> Tensor:
    """bool (rows, columns) to eight a byte, uint8 (rows, ceil(columns / 8))."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1))


def unpack(data: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(data.numpy(), axis=1, count=columns)).bool()


def _decision(dense: Decision, scores: list[str], counts: Mapping[Mask, Mapping[str, int]]) -> Decision:
    weight, whole = dense.unit.weights[0], dense.choices[0]
    assert len(dense.unit.weights) == len(dense.choices) == 1, "masks are about one matrix in one format"
    if weight.block is None:
        return replace(dense, choices=(replace(whole, others={WEIGHTS: 0.0}),))
    found, refused = [replace(whole, others={WEIGHTS: float(weight.num_weights)})], dict(dense.refused)
    for mask in menu(scores):
        name = mask.choice(whole.name)
        if why := mask.refuses(weight.shape[1]):
            refused[name] = why
            continue
        kept = counts[mask][weight.name] if mask in counts else num_kept(mask, weight)
        found.append(Choice(name, whole.bytes_, whole.stored_bytes, {WEIGHTS: float(kept)}))
    return Decision(dense.unit, tuple(found), SPARSITY, refused)


def num_kept(mask: Mask, weight: Weight) -> int:
    """Weights that a mask keeps of a matrix, as many in each row."""
    return weight.shape[0] * round(mask.density * weight.shape[1])
