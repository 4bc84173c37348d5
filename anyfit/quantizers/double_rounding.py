"""Double Rounding: integers of few bits are the rounded integers of many bits, so that one stored tensor holds all sizes.

Paper: "Nearly Lossless Adaptive Bit Switching", arXiv 2502.01199, equations 1 to 5 and 13. With h bits stored and D = h - l,

    W_h = clip(round(W / s), -2^(h-1), 2^(h-1) - 1)
    W_l = clip(round(W_h / 2^D), -2^(l-1), 2^(l-1) - 1),    of value W_l * s * 2^D.

The second rounding is an integer operation, (W_h + 2^(D-1)) >> D: halves go up. (The first is torch's: halves to even. It is
done once, when the integers are made.) All sizes share the scale s up to a power of two.

Differences from the paper: weights alone are quantised; activations, which it quantises too, stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anyfit.formats.nested import bounds, switched

FACTORS = 40
"""Scales that `first_scale` tries, as parts of the one at which nothing is clipped."""
TINY = 1e-30


def integers(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """What is stored, int8: `weight` over `scale`, which broadcasts, rounded and clipped to at most eight `bits`."""
    return (weight / scale).round_().clamp_(*bounds(bits)).to(torch.int8)


def values(stored: Tensor, scale: Tensor, high: int, low: int) -> Tensor:
    """What the integers of `low` bits stand for, in the type of `scale`."""
    return switched(stored, high, low).to(scale.dtype) * (scale * 2 ** (high - low))


def rounded_twice(weight: Tensor, scale: Tensor, high: int, low: int) -> Tensor:
    """`values` of `integers`, to be differentiated: through the rounding as if it weren't there, and by the scale as LSQ does."""
    found: Tensor = _RoundedTwice.apply(weight, scale, high, low)
    return found


class _RoundedTwice(torch.autograd.Function):
    """With v = W / s and the bounds of h bits: by W, 1 inside; by s, 2^D W_l - v inside and 2^D W_l beyond, where v doesn't matter."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, high: int, low: int) -> Tensor:
        found = values(integers(weight, scale, high), scale, high, low)
        ctx.save_for_backward(weight, scale, found)
        ctx.high = high
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        weight, scale, found = ctx.saved_tensors
        ratio, (lowest, highest) = weight / scale, bounds(ctx.high)
        inside = (ratio >= lowest) & (ratio <= highest)
        by_scale = gradient * (found / scale - torch.where(inside, ratio, 0))
        return gradient * inside, by_scale.sum_to_size(scale.shape), None, None


def first_scale(weight: Tensor, high: int, lows: tuple[int, ...]) -> Tensor:
    """For each row of the last dimension one scale, (..., 1): of those tried, the one whose squared errors at all sizes have the least
    product.

    A product, so that the many times larger errors of few bits don't decide alone.
    """
    largest = weight.abs().amax(-1, keepdim=True).clamp_min(TINY) / bounds(high)[1]
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for number in range(FACTORS // 10, FACTORS + 1):
        scale = largest * (number / FACTORS)
        stored = integers(weight, scale, high)
        errors = [(values(stored, scale, high, low) - weight).square().mean(-1, keepdim=True) for low in lows]
        total = sum(error.clamp_min(TINY).log() for error in errors)
        assert isinstance(total, Tensor)
        best, least = torch.where(total < least, scale, best), torch.minimum(total, least)
    return best
