"""The contract of an importance: it orders the structures of one matrix, and says what is left when few of them are kept.

A structure is a run of columns of a matrix that reads it: the heads around one key and value head in the attention's output
projection, one channel or several in the feed-forward's. Most importances look at a matrix and its inputs alone; some look at what the
whole network does without a structure, and score all of them together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyfit.calibration.statistics import DAMPING
from anyfit.interface import LANGUAGE, Interface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from anyfit.architectures.base import Architecture
    from anyfit.progress import Progress
    from anyfit.structure.levels import Structure


@dataclass(frozen=True)
class Ladder:
    """What is left of `weight` (outputs, inputs) float32 when few of its structures are kept, made when it is asked for: all levels
    together take many times what the matrix does.

    `order` (structures,) int64: the structure removed last comes first, so that every kept set is the beginning of it. `repair`: where
    the kept columns make good what the removed ones gave.
    """

    order: Tensor
    weight: Tensor
    repair: Repair | None

    def level(self, kept: int) -> Tensor:
        """(outputs, inputs) float32, columns in the matrix's own order, removed ones exactly zero; the matrix itself where all stay."""
        structures, inputs = len(self.order), self.weight.shape[1]
        assert 0 <= kept <= structures, f"{kept} of {structures} structures"
        if kept == structures:
            return self.weight
        columns = _columns(self.order[:kept], inputs // structures)
        level = torch.zeros_like(self.weight)
        level[:, columns] = self.weight[:, columns] if self.repair is None else self.repair.keeping(len(columns)).float()
        return level


class Importance(ABC):
    """Stateless. `repairs`: the columns that are kept make good, by least squares, what the removed ones gave."""

    name: str
    repairs: bool

    @abstractmethod
    def order(self, weight: Tensor, moments: Tensor, size: int) -> Tensor:
        """(structures,) int64, see `Ladder.order`. The arguments are those of `ladder`, and aren't changed. Deterministic: of equals
        the first is kept."""

    def ladder(self, weight: Tensor, moments: Tensor, size: int) -> Ladder:
        """The order of the structures, and the weights for any number of kept ones.

        `weight` (outputs, inputs) float32: the matrix that reads the structures. `moments` (inputs, inputs): mean of x xᵀ, symmetric.
        `size`: columns of a structure, which lie side by side.
        """
        structures = _num_structures(weight, moments, size)
        order = self.order(weight, moments, size)
        assert order.sort().values.tolist() == list(range(structures)), "an order names every structure once"
        return Ladder(order, weight, Repair.of(weight, moments, _columns(order, size)) if self.repairs else None)


class NetworkImportance(ABC):
    """One that takes the whole network: in memory, in evaluation mode. Stateless. `repairs`: as an importance's. `reads`: what the networks
    read that it can be asked about."""

    name: str
    repairs: bool
    reads: tuple[Interface, ...] = (LANGUAGE,)

    @abstractmethod
    def scores(
        self, model: PreTrainedModel, architecture: Architecture, structures: Mapping[str, Structure], segments: Tensor, progress: Progress
    ) -> dict[str, Tensor]:
        """By the name of the matrix that reads them, what the removal of each of its structures is expected to cost: (structures,)
        float64, not below zero; those of an axis can be compared and added up over the network. `segments`: as the network's interface
        reads them. The model isn't changed, nor is the global random state. Deterministic."""

    @abstractmethod
    def readings(self, structures: Mapping[str, Structure], segments: Tensor, interface: Interface) -> float:
        """What `scores` takes, as how many passes over as many segments (segments, positions) through the whole network."""

    def of(self, scores: Tensor) -> Importance:
        """What these scores make of one matrix."""
        return Scored(self.name, self.repairs, scores)


class Scored(Importance):
    """By scores that are known, (structures,)."""

    def __init__(self, name: str, repairs: bool, scores: Tensor) -> None:
        self.name, self.repairs, self.known = name, repairs, scores

    def order(self, weight: Tensor, moments: Tensor, size: int) -> Tensor:
        return by_score(self.known)


@dataclass(frozen=True)
class Repair:
    """The least squares of every beginning of an order at once: of the factor L of the damped moments in that order, the upper left
    corner is the factor of the kept ones' moments. `forward` (inputs, outputs): L⁻¹ H Wᵀ. Float64."""

    lower: Tensor
    forward: Tensor

    @classmethod
    def of(cls, weight: Tensor, moments: Tensor, columns: Tensor) -> Repair:
        lower = torch.linalg.cholesky(damped(moments)[columns][:, columns])
        # H Wᵀ = L Lᵀ Wᵀ, so that the forward substitution has nothing to solve.
        return cls(lower, lower.T @ weight.double().T[columns])

    def keeping(self, number: int) -> Tensor:
        """(outputs, number): the W' that is least in tr((W - W') H (W - W')ᵀ), with the first `number` columns alone."""
        corner = self.lower[:number, :number]
        return torch.linalg.solve_triangular(corner.T, self.forward[:number], upper=True).T


def damped(moments: Tensor) -> Tensor:
    """H = M + d I, float64 and positive definite: d starts at `DAMPING` of the mean diagonal of the columns that were ever active, and
    doubles until H has a Cholesky factor."""
    matrix = moments.double()
    diagonal = matrix.diagonal()
    active = diagonal[diagonal != 0]
    damping = DAMPING * (float(active.mean()) if len(active) else 1.0)
    while True:
        found = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
        _, failed = torch.linalg.cholesky_ex(found)
        if not failed:
            return found
        damping *= 2
        assert damping < float("inf"), "no damping makes the second moments positive definite: they are not finite"


def squared_error(difference: Tensor, moments: Tensor) -> float:
    """tr(D M Dᵀ): expected squared error of all outputs when the weights are off by D (outputs, inputs)."""
    difference = difference.double()
    return max(0.0, float(((difference @ moments.double()) * difference).sum()))


def by_score(scores: Tensor) -> Tensor:
    """Structures by falling score; of equals the first comes first."""
    return scores.argsort(descending=True, stable=True)


def _columns(structures: Tensor, size: int) -> Tensor:
    return (structures[:, None] * size + torch.arange(size)).flatten()


def _num_structures(weight: Tensor, moments: Tensor, size: int) -> int:
    columns = weight.shape[1]
    assert moments.shape == (columns, columns), (weight.shape, moments.shape)
    assert columns % size == 0, f"{columns} columns in structures of {size}"
    return columns // size
