"""Which code stands for a weight, for compiled loops over the columns.

A format offers a *book*: a named tuple of the tables to choose by. What is done with a kind of book is said by three
compiled functions, for `Levels` here; a format whose kind of book is new brings its own, see `implements`. All numbers
are float32 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from anyfit.formats.fitting_lanes import ZERO, Floats, compiled

Codes = NDArray[np.uint8]


class Levels(NamedTuple):
    """Columns are coded one by one, as the nearest of some levels.

    `borders` (levels - 1,): middles between neighbours in rising order, whose codes are `order` (levels,). Both are empty
    where levels are consecutive whole numbers from `lowest`, of which there are `top` + 1.
    """

    lowest: np.float32
    top: np.float32
    borders: Floats
    order: Codes


def levels_book(levels: Tensor, uniform: bool) -> Levels:
    """For levels (K,), of which code k is the k-th; `uniform`: consecutive whole numbers."""
    lowest, top = np.float32(levels[0]), np.float32(len(levels) - 1)
    if uniform:
        return Levels(lowest, top, np.empty(0, np.float32), np.empty(0, np.uint8))
    ordered, order = levels.sort(stable=True)
    return Levels(lowest, top, ((ordered[1:] + ordered[:-1]) / 2).numpy(), order.to(torch.uint8).numpy())


def memory(book: Any) -> Any:
    """What `prepare` and `choose` write to, whatever they like. Compiled code only."""
    raise NotImplementedError(f"nothing implements this for {type(book).__name__}")


def prepare(book: Any, metric: Floats, memory: Any) -> None:
    """Called once before many choices with the same `metric`, see `choose`. Compiled code only."""
    raise NotImplementedError(f"nothing implements this for {type(book).__name__}")


def choose(book: Any, metric: Floats, memory: Any, target: Floats, codes: Codes) -> None:
    """Write to `codes` (vector,) those of the storable levels nearest to `target` (vector,). Compiled code only.

    `metric` (vector, vector), positive definite: the error of a difference e is e @ metric @ e.
    """
    raise NotImplementedError(f"nothing implements this for {type(book).__name__}")


def implements(step: Callable[..., Any], kind: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: what `step` (one of the three above) does with books of this kind. The function is compiled."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        @overload(step)
        @wraps(body)
        def of_kind(book: Any, *_: Any) -> Any:
            return body if isinstance(book, types.BaseNamedTuple) and book.instance_class is kind else None

        return body

    return register


@implements(memory, Levels)
def _levels_memory(book: Levels) -> None:
    pass


@implements(prepare, Levels)
def _levels_prepare(book: Levels, metric: Floats, memory: None) -> None:
    pass


@implements(choose, Levels)
def _levels_choose(book: Levels, metric: Floats, memory: None, target: Floats, codes: Codes) -> None:
    wanted = target[0]
    if len(book.borders) == 0:
        step = np.rint(wanted) - book.lowest
        # written so that what isn't a number gets a code
        step = step if step > ZERO else ZERO
        codes[0] = np.uint8(step if step < book.top else book.top)
    else:
        below = 0
        for border in book.borders:
            below += border < wanted
        codes[0] = book.order[below]


@compiled
def choose_each(book: Any, metric: Floats, targets: Floats, codes: Codes) -> None:
    """`choose` for each row of `targets` and `codes`, (rows, vector)."""
    own = memory(book)
    prepare(book, metric, own)
    for row in range(len(targets)):
        choose(book, metric, own, targets[row], codes[row])
