"""Floating-point types: little-endian, rounded to nearest, ties to even."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfit.core.errors import UserError
from anyfit.formats.base import CastFormat


class FloatFormat(CastFormat):
    """A type that torch knows."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    @property
    def bits(self) -> float:
        return 8 * self.dtype.itemsize

    def encode(self, weight: Tensor) -> Tensor:
        """Raises `UserError` where a weight is so large that it would become infinite."""
        cast = weight.to(self.dtype)
        if not cast.isfinite().all():
            raise UserError(
                f"A weight of magnitude {weight.abs().max().item():.4g} is beyond "
                f"{torch.finfo(self.dtype).max:.4g}, the largest that {self.name} can hold.",
                remedy="Keep this matrix in F32.",
            )
        return cast.contiguous().view(torch.uint8).clone()

    def decode(self, data: Tensor) -> Tensor:
        return data.contiguous().view(self.dtype).float()


F16 = FloatFormat("F16", torch.float16)
BF16 = FloatFormat("BF16", torch.bfloat16)
F32 = FloatFormat("F32", torch.float32)
