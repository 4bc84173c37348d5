"""Integers of 8 bits that multiply integers of 8 bits: what a matrix reads is rounded, too (W8A8).

Weights are symmetric, from -127 to 127, with one float32 scale a row: value = scale * q. What they multiply is rounded to 0 to 255 with one
scale and zero point (`anyfit.activations`), so that a product is a sum of integers, exact, times two scales.

- `int8_dynamic`: the grid of the inputs is found anew whenever the matrix multiplies.
- `int8_static`: it is the same for all inputs, found in calibration, and stored with the matrix: a float32 and a byte.

A row in bytes: its scale (4), then its codes. A matrix's own bytes come before all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyfit.activations import Dynamic, Rounding, Static
from anyfit.formats.base import Format

LARGEST = 127
UNSEEN = Static(1 / 16, 128)
"""The grid of inputs that nobody has seen: from -8 to 8, about, which norms put out."""
_SHRINKING = torch.linspace(1, 0.8, 11)
"""Scales that are tried, as shares of the one that the largest weight of a row asks for."""
_SCALE_BYTES = 4


class RoundedFormat(Format):
    """See above. `bits` counts the codes, a row's scale is `overhead`."""

    block, bits, overhead = 1, 8.0, _SCALE_BYTES
    rounds = True

    def encode(self, weight: Tensor, importance: Tensor) -> Tensor:
        """(rows, columns) to uint8 (data_rows, row_bytes), of inputs that nobody has seen. Of some scales each row has the one of the
        smallest error. `importance` (columns,): what each column's squared error counts."""
        scale, codes = fitted(weight, importance)
        return self.pack(codes, scale)

    def pack(self, codes: Tensor, scale: Tensor) -> Tensor:
        """int8 (rows, columns) and float32 (rows,) to the rows' bytes, uint8 (rows, row_bytes)."""
        return torch.cat([scale.contiguous().view(torch.uint8).view(-1, _SCALE_BYTES), codes.contiguous().view(torch.uint8)], 1)

    def read(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """The codes, int8 (rows, columns), and scales, float32 (rows,), of uint8 (data_rows, row_bytes)."""
        rows = data[self._shared_rows(data.shape[1]) :]
        # Of no rows or one, `contiguous` would leave strides that aren't a float's.
        scales, codes = (part.clone(memory_format=torch.contiguous_format) for part in (rows[:, :_SCALE_BYTES], rows[:, _SCALE_BYTES:]))
        return codes.view(torch.int8), scales.view(torch.float32).squeeze(1)

    def decode(self, data: Tensor) -> Tensor:
        codes, scale = self.read(data)
        return codes.float() * scale[:, None]


class DynamicFormat(RoundedFormat):
    name = "int8_dynamic"

    def inputs(self, data: Tensor) -> Rounding:
        return Dynamic()


class StaticFormat(RoundedFormat):
    """The grid of the inputs is what its rows share: a float32 and a byte."""

    name, shared = "int8_static", _SCALE_BYTES + 1

    def pack(self, codes: Tensor, scale: Tensor) -> Tensor:
        rows = super().pack(codes, scale)
        return self.with_grid(torch.cat([rows.new_zeros(self._shared_rows(rows.shape[1]), rows.shape[1]), rows]), UNSEEN)

    def with_grid(self, data: Tensor, grid: Static) -> Tensor:
        """The same matrix for inputs on another grid."""
        changed = data.clone()
        own = changed.view(-1)[: self.shared]
        own[:_SCALE_BYTES], own[_SCALE_BYTES] = torch.tensor([grid.scale]).view(torch.uint8), grid.zero
        return changed

    def inputs(self, data: Tensor) -> Static:
        own = data[: self._shared_rows(data.shape[1])].flatten()[: self.shared].clone()
        return Static(float(own[:_SCALE_BYTES].view(torch.float32)), int(own[_SCALE_BYTES]))


def fitted(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scales float32 (rows,) and codes int8 (rows, columns)."""
    whole = weight.abs().amax(1) / LARGEST
    least, found = torch.full_like(whole, torch.inf), whole
    for share in _SHRINKING:
        scale = whole * share
        error = ((weight - _rounded(weight, scale) * scale[:, None]).square() * importance).sum(1)
        found, least = torch.where(error < least, scale, found), torch.minimum(error, least)
    return found, _rounded(weight, found).to(torch.int8)


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    """Weights over their rows' scales as whole numbers in range; nothing where a scale is none."""
    return torch.where(scale[:, None] > 0, weight / scale[:, None], 0).round_().clamp_(-LARGEST, LARGEST)


int8_dynamic, int8_static = DynamicFormat(), StaticFormat()
