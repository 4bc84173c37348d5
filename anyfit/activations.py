"""Activations in 8 bits: how what a matrix multiplies is rounded first, and modules that round what they read.

ONNX's affine kind: codes from 0 to 255 and a whole zero point, x = scale * (code - zero). What comes out here are these values in float32,
of the very codes that a runtime multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HIGHEST = 255
"""The largest code."""

Rounding = Callable[[Tensor], Tensor]
"""What a module reads, float32 of any shape, to the values that it multiplies."""


@dataclass(frozen=True)
class Static:
    """The same grid for every input. `scale`: a float32's value; `zero`: the code of 0."""

    scale: float
    zero: int

    def __call__(self, inputs: Tensor) -> Tensor:
        scale = torch.tensor(self.scale, device=inputs.device)  # of a plain number torch may take the inverse, and round otherwise
        return (inputs / scale).round_().clamp_(-self.zero, HIGHEST - self.zero).mul_(scale)


@dataclass(frozen=True)
class Dynamic:
    """A grid for each segment, from its least to its largest number and around 0, as DynamicQuantizeLinear finds it.

    So segments are rounded as in batches of one; in a larger batch a runtime has one grid for all of it. Padding counts, as it does there.
    """

    def __call__(self, inputs: Tensor) -> Tensor:
        numbers = inputs.flatten(1)
        low, high = numbers.amin(1).clamp_max(0), numbers.amax(1).clamp_min(0)
        scale = (high - low) / HIGHEST
        scale = torch.where(scale == 0, 1, scale)
        zero = (-low / scale).clamp_(0, HIGHEST).round_()
        scale, zero = (part.view(-1, *[1] * (inputs.ndim - 1)) for part in (scale, zero))
        return (inputs / scale).round_().clamp_(-zero, HIGHEST - zero).mul_(scale)


@dataclass(frozen=True)
class Among:
    """Rounds as if some of the columns alone were there: `kept` (columns,) bool. The others, which nothing reads, are zero."""

    kept: Tensor
    rounding: Rounding

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.rounding(torch.where(self.kept.to(inputs.device), inputs, 0))


@dataclass(frozen=True)
class _Hook:
    rounding: Rounding

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.rounding(args[0]), *args[1:]


def round_inputs(module: nn.Module, rounding: Rounding | None) -> None:
    """Have a module round what it reads from now on, in this way and no other; None: not at all."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
        del hooks[key]
    if rounding is not None:
        module.register_forward_pre_hook(_Hook(rounding))


def roundings(model: nn.Module) -> dict[str, Rounding]:
    """How modules round what they read, by path; of those that do."""
    found = ((path, hook) for path, module in model.named_modules() for hook in module._forward_pre_hooks.values())
    return {path: hook.rounding for path, hook in found if isinstance(hook, _Hook)}


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Nothing is rounded while the block lasts."""
    found = roundings(model)
    try:
        for path in found:
            round_inputs(model.get_submodule(path), None)
        yield
    finally:
        for path, rounding in found.items():
            round_inputs(model.get_submodule(path), rounding)
