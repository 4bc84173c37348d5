"""What `gptq_span.round_lanes` does, on a graphics processor: the same numbers to the bit.

A program holds some rows of the columns at hand in registers. The column that is rounded next is picked out by a mask: its number
is known only as the loop runs, and registers can't be indexed.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyfit.formats.base import GridFormat
from anyfit.formats.choose import Levels
from anyfit.quantizers.gptq_span import Grid, Order, Rows

ROWS = 16
"""Of a program."""
MAGIC = 1.5 * 2**23
"""Added to a small float32 number and taken off again, it rounds to whole numbers, ties to even, as `rint` does."""


def round_lanes(format_: GridFormat, order: Order[Tensor], grid: Grid[Tensor], rows: Rows[Tensor]) -> None:
    """Round all columns, each one's errors made good by the later ones, into `rows`. All arrays of `grid` and `rows` are transposed
    and lie side by side in the memory of one device."""
    book = format_.book
    assert isinstance(book, Levels), format_.name
    columns, num_rows = rows.free.shape
    for part in rows:
        assert part.is_contiguous(), part.stride()
    where = rows.free.device
    with torch.cuda.device(where) if where.type == "cuda" else nullcontext():
        _round[(triton.cdiv(num_rows, ROWS),)](
            *(rows.weights, rows.free, rows.codes, rows.passed, rows.errors),
            *(order.upper, order.passed, order.damping, order.place),
            *(grid.scale, grid.inverse, grid.offset),
            *(grid.levels, *_borders(format_, where), len(book.borders)),
            *(float(book.lowest), float(book.top), columns, num_rows, grid.group),
            uniform=len(book.borders) == 0,
            magic=MAGIC,
            padded=triton.next_power_of_2(columns),
            width=ROWS,
            num_warps=2,
            enable_fp_fusion=False,  # the processors' loops round each product
        )


@cache
def _borders(format_: GridFormat, where: torch.device) -> tuple[Tensor, Tensor]:
    """Of the format's book, and the codes between them."""
    return torch.from_numpy(format_.book.borders).to(where), torch.from_numpy(format_.book.order).to(where)


@triton.jit
def _round(  # type: ignore[no-untyped-def]
    weights,
    free,
    codes,
    passed,
    errors,
    upper,
    shares,
    dampings,
    place,
    scales,
    inverses,
    offsets,
    levels,
    borders,
    border_codes,
    num_borders,
    lowest,
    top,
    columns,
    num_rows,
    group,
    uniform: tl.constexpr,
    magic: tl.constexpr,
    padded: tl.constexpr,
    width: tl.constexpr,
):
    column = tl.arange(0, padded)
    row = tl.program_id(0) * width + tl.arange(0, width)
    there = row < num_rows
    cells = column[:, None] * num_rows + row[None, :]
    inside = (column[:, None] < columns) & there[None, :]
    now = tl.load(free + cells, mask=inside, other=0.0)
    original = tl.load(weights + cells, mask=inside, other=0.0)
    pushes = tl.zeros((padded, width), tl.float32)
    chosen = tl.zeros((padded, width), tl.int32)
    cost = tl.load(errors + row, mask=there, other=0.0)
    for at in range(columns):
        picked = column[:, None] == at
        value = tl.sum(tl.where(picked, now, 0.0), 0)
        weight = tl.sum(tl.where(picked, original, 0.0), 0)
        cell = tl.load(place + at) // group * num_rows + row
        scale = tl.load(scales + cell, mask=there, other=0.0)
        inverse = tl.load(inverses + cell, mask=there, other=0.0)
        offset = tl.load(offsets + cell, mask=there, other=0.0)
        wanted = (value + offset) * inverse
        code, level = _nearest(wanted, levels, borders, border_codes, num_borders, lowest, top, uniform, magic, width)
        rounded = level * scale - offset
        pushed = tl.load(shares + at) * (value - rounded)
        away = rounded - weight
        cost += (pushed * pushed - tl.load(dampings + at) * away * away).to(tl.float64)
        later = (column > at) & (column < columns)
        share = tl.load(upper + at * columns + column, mask=later, other=0.0)
        now = tl.where(later[:, None], now - pushed[None, :] * share[:, None], now)
        pushes = tl.where(picked, pushed[None, :], pushes)
        chosen = tl.where(picked, code[None, :], chosen)
    tl.store(free + cells, now, mask=inside)
    tl.store(codes + cells, chosen.to(tl.uint8), mask=inside)
    tl.store(passed + cells, pushes, mask=inside)
    tl.store(errors + row, cost, mask=there)


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]
    wanted,
    levels,
    borders,
    border_codes,
    num_borders,
    lowest,
    top,
    uniform: tl.constexpr,
    magic: tl.constexpr,
    width: tl.constexpr,
):
    """The code of the level nearest to each of `width` numbers, and that level."""
    if uniform:
        # a little beyond either end, where all that follows rounds as for the number itself; what isn't a number becomes the lowest
        near = tl.where(wanted > lowest - 1, wanted, lowest - 1)
        near = tl.where(near < lowest + top + 1, near, lowest + top + 1)
        step = (near + magic) - magic - lowest
        step = tl.where(step > 0, step, 0.0)
        step = tl.where(step < top, step, top)
        code = step.to(tl.int32)
        level = step + lowest
    else:
        code = tl.zeros((width,), tl.int32)
        for border in range(num_borders):
            code += (tl.load(borders + border) < wanted).to(tl.int32)
        code = tl.load(border_codes + code).to(tl.int32)
        level = tl.load(levels + code)
    return code, level
