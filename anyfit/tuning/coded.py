"""Stored matrices in a network: what tuning starts from and ends with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.formats.base import GridFormat, Scales


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
class Matrix:
    """A stored matrix and its place in a network.

    `weight` float32 (outputs, inputs): the original, rows in stored order. `order` (outputs,): stored rows as indices into
    the network's; None where equal. `transposed`: the network's parameter is (inputs, outputs).
    """

    coded: Coded
    weight: Tensor
    order: Tensor | None = None
    transposed: bool = False

    def placed(self, values: Tensor) -> Tensor:
        """Values in stored order, (outputs, inputs), as the network's parameter."""
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(0, self.order, values)
        return values.T if self.transposed else values

    def taken(self, parameter: Tensor) -> Tensor:
        """The inverse of `placed`, for a gradient of the network's parameter too."""
        values = parameter.T if self.transposed else parameter
        return values if self.order is None else values[self.order]
