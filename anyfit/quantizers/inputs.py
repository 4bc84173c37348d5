"""What a variant stores and loses of its inputs, where these are rounded as well as its weights."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from anyfit.calibration.spread import Spread
from anyfit.formats.base import Format
from anyfit.formats.w8a8 import StaticFormat
from anyfit.quantizers.base import Encoded


def with_inputs(format_: Format, encoded: Encoded, spread: Spread | None) -> Encoded:
    """A variant as a quantizer made it, with the grid of its inputs where it stores one, and with the error that rounding them adds. As it
    is where they aren't rounded, or weren't seen.

    An output's is E (w·e)² = |w|² E e²: the errors e of its inputs are taken to be independent of each other and all alike.
    """
    if not format_.rounds or spread is None:
        return encoded
    data, error = encoded.data, spread.dynamic_error
    if isinstance(format_, StaticFormat):
        grid, error = spread.grid
        data = format_.with_grid(data, grid)
    return replace(encoded, data=data, errors=encoded.errors + error * _squares(format_.decode(data)))


def _squares(weight: Tensor) -> Tensor:
    """|w|² of each row, (rows,) float64."""
    return weight.double().square().sum(1)
