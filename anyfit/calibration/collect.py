"""The calibration pass: second moments of everything that a decided matrix multiplies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.calibration.spread import Spread
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.errors import DataError
from anyfit.core.units import Weight
from anyfit.devices import matrix_speed
from anyfit.distributed import ALONE, Group, exact
from anyfit.interface import interface_of
from anyfit.progress import Progress

_ROWS_AT_ONCE = 512


class Moments:
    """Running sum of x xᵀ of one input, float64 across batches, and exact: the same in any order of the batches. Where x is.

    `agree`: what is called with the largest number of this process's first batch, and returns that of all batches' first. `spread`:
    where it is counted, too, how large the numbers are; None where nobody asks.
    """

    def __init__(self, columns: int, agree: Callable[[float], float], spread: Spread | None = None) -> None:
        self.columns, self.count, self.spread = columns, 0, spread
        self.total: Tensor | None = None
        self._agree = agree
        self._largest: float | None = None

    def add(self, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if self._largest is None or self.total is None:
            self._largest = self._agree(float(x.square().sum(0).max()))
            self.total = torch.zeros(self.columns, self.columns, dtype=torch.float64, device=x.device)
        # Some rows at a time: the square of a wide input isn't held in three types at once.
        for start in range(0, len(self.total), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            self.total[rows] += exact(x[:, rows].T @ x, self._largest)
        self.count += len(x)

    def add_up(self, group: Group, owner: int) -> None:
        """Over all processes, in the `owner`."""
        if self.total is not None:
            group.add(self.total, owner)
        self.count = sum(group.gathered(self.count))
        if self.spread is not None:
            self.spread.add_up(group)

    def statistics(self, name: str) -> InputStatistics:
        """Uses less memory than the moments: these may be dropped afterwards."""
        if self.total is None:
            return InputStatistics.unknown(self.columns)
        hessian = torch.empty(self.total.shape, device=self.total.device)
        for start in range(0, len(self.total), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            torch.div(self.total[rows], self.count, out=hessian[rows])
        if not hessian.sum().isfinite():
            raise DataError(
                f"The calibration text makes the inputs of {name} overflow.",
                remedy="The model may be broken in float32: check that it predicts text at all.",
            )
        return InputStatistics(hessian, self.count, self.spread)


def collect(
    model: PreTrainedModel,
    architecture: Architecture,
    weights: Iterable[Weight],
    tokens: Tensor,
    *,
    batch_size: int = 8,
    progress: Progress,
) -> dict[str, InputStatistics]:
    """Statistics by input name (`Weight.input`), from one pass of `tokens` (segments, length) through `model`.

    Matrices that read the same input share one entry; it is observed once. Memory: one float64 square of
    each distinct input's width.
    """
    (found,) = collect_growing(model, architecture, weights, tokens, [len(tokens)], batch_size=batch_size, progress=progress)
    return found


@torch.inference_mode()
def collect_growing(
    model: PreTrainedModel,
    architecture: Architecture,
    weights: Iterable[Weight],
    tokens: Tensor,
    sizes: Sequence[int],
    *,
    batch_size: int = 8,
    progress: Progress,
) -> Iterator[dict[str, InputStatistics]]:
    """What `collect` would return for the first so many segments, for each of the rising `sizes`, from one pass.

    The model must not be run while this is being iterated.
    """
    with observed(model, architecture, weights) as moments, progress.stage("calibrate", sizes[-1]) as stage:
        for start, stop in pairwise([0, *sizes]):
            for batch in tokens[start:stop].split(batch_size):
                with matrix_speed(model.device):
                    interface_of(model.config)(model, batch.to(model.device))
                stage.advance(len(batch))
            yield {name: entry.statistics(name) for name, entry in moments.items()}


@contextmanager
def observed(
    model: PreTrainedModel, architecture: Architecture, weights: Iterable[Weight], group: Group = ALONE, rounded: Collection[str] = ()
) -> Iterator[dict[str, Moments]]:
    """The moments of everything that these matrices multiply while the block lasts, by input name; each is observed once.

    Those of this process's text, without its padding; all processes of the `group` must run the same modules, each on some text.
    `rounded`: names of inputs of which is seen, too, how large their numbers are.
    """
    moments: dict[str, Moments] = {}
    text = _Text()
    handles = [model.register_forward_pre_hook(text.begins, with_kwargs=True)]
    for weight in weights:
        if weight.input is None or weight.input in moments:
            continue
        moments[weight.input] = Moments(weight.shape[1], group.told, Spread() if weight.input in rounded else None)
        module = model.get_submodule(architecture.hook_path(weight))
        handles.append(module.register_forward_pre_hook(_observer(moments[weight.input], text)))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


class _Text:
    """Which tokens of what the network reads now are a text's, (segments, length); None where all are."""

    def __init__(self) -> None:
        self.present: Tensor | None = None

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.present = None if mask is None else mask.bool()


def _observer(moments: Moments, text: _Text) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        present, x = text.present, inputs[0]
        own = x if present is None or x.shape[:2] != present.shape else x[present]
        moments.add(own)
        if moments.spread is not None:
            moments.spread.add(x, own)

    return observe
