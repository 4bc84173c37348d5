"""Stored matrices in a network: what tuning starts from and ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.core.units import Weight
from anyfit.formats.aqlm import Additive, AdditiveFormat
from anyfit.formats.base import Format, GridFormat, Scales


def placed(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows in stored order as the network has them. `order` (rows,): stored rows as indices into the network's; None where equal."""
    return rows if order is None else torch.empty_like(rows).index_copy_(0, order.to(rows.device), rows)


def taken(rows: Tensor, order: Tensor | None) -> Tensor:
    """The inverse of `placed`."""
    return rows if order is None else rows[order]


@dataclass(frozen=True)
class Coded:
    """A matrix as it is stored: `codes` uint8 (outputs, inputs), rows in the target's order, and the scales of whole rows."""

    format_: GridFormat
    codes: Tensor
    scales: Scales

    @property
    def data(self) -> Tensor:
        """The file's bytes, uint8 (outputs, row_bytes)."""
        return self.format_.pack(self.codes, self.scales)


@dataclass(frozen=True)
class Summed:
    """A matrix as it is stored in additive codebooks of its own, rows in the target's order."""

    format_: AdditiveFormat
    parts: Additive

    @property
    def data(self) -> Tensor:
        """The file's bytes, uint8 (data_rows, row_bytes)."""
        return self.format_.pack(self.parts)


Kept = TypeVar("Kept", bound=Coded | Summed, covariant=True)


@dataclass(frozen=True)
class Matrix(Generic[Kept]):
    """A stored matrix and its place in a network.

    `weight` float32 (outputs, inputs): the original, rows in stored order. `order` (outputs,): stored rows as indices into
    the network's; None where equal. `transposed`: the network's parameter is (inputs, outputs).
    """

    coded: Kept
    weight: Tensor
    order: Tensor | None = None
    transposed: bool = False

    def placed(self, values: Tensor) -> Tensor:
        """Values in stored order, (outputs, inputs), as the network's parameter."""
        values = placed(values, self.order)
        return values.T if self.transposed else values

    def taken(self, parameter: Tensor) -> Tensor:
        """The inverse of `placed`, for a gradient of the network's parameter too."""
        return taken(parameter.T if self.transposed else parameter, self.order)


@dataclass(frozen=True)
class Tuned:
    """The tuned matrices by name, and mean KL to the original per held-out token in nats, as given and as tuned."""

    coded: Mapping[str, Coded | Summed]
    before: float
    after: float


@dataclass(frozen=True)
class Stored:
    """A matrix of a configuration: `data` uint8 (data_rows, row_bytes), rows in the target's `order` (outputs,), None where equal."""

    weight: Weight
    format_: Format
    data: Tensor
    order: Tensor | None

    def matrix(self, original: PreTrainedModel) -> Matrix[Coded | Summed]:
        """As tuning wants it. The format must have codes."""
        if isinstance(self.format_, AdditiveFormat):
            summed = Summed(self.format_, self.format_.read(self.data))
            return Matrix(summed, self._original(original), self.order, self.weight.transposed)
        return self.grid(original)

    def grid(self, original: PreTrainedModel) -> Matrix[Coded]:
        """The same where the format must be a grid."""
        assert isinstance(self.format_, GridFormat)
        coded = Coded(self.format_, *self.format_.read(self.data))
        return Matrix(coded, self._original(original), self.order, self.weight.transposed)

    def _original(self, original: PreTrainedModel) -> Tensor:
        values = original.get_parameter(self.weight.name).detach().float()
        values = values.T if self.weight.transposed else values
        return values.contiguous() if self.order is None else values[self.order]

    def values(self) -> Tensor:
        """Decoded, as the network's parameter."""
        decoded = placed(self.format_.decode(self.data), self.order)
        return decoded.T if self.weight.transposed else decoded


def repacked(format_: Format, data: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """The bytes of a matrix with other halves, or other codebooks, by name as `Scales.stored` or `Additive` has them; rows in stored
    order. The format must have codes, which stay."""
    if isinstance(format_, AdditiveFormat):
        return format_.pack(replace(format_.read(data), **parts))
    assert isinstance(format_, GridFormat)
    codes, scales = format_.read(data)
    return format_.pack(codes, format_.assemble({**scales.stored, **parts}))
