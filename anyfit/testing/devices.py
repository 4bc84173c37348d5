"""One case of rounding a few columns, for comparing what different devices make of it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyfit.formats.base import SPAN, GridFormat
from anyfit.quantizers.gptq import round_columns
from anyfit.quantizers.gptq_span import Grid, Order, Rows


@dataclass(frozen=True)
class RoundingCase:
    """Some columns of a span, with everything that decides how they are rounded; see `anyfit.quantizers.gptq_span`."""

    format_: GridFormat
    order: Order[Tensor]
    grid: Grid[Tensor]
    rows: Rows[Tensor]

    def rounded(self, device: str) -> Rows[Tensor]:
        """What is made of the rows there."""
        order, grid, rows = self.on(device)
        round_columns(self.format_, rows, order, grid)
        return Rows(*(part.cpu() for part in rows))

    def different(self, device: str) -> list[str]:
        """Names of what isn't the same to the bit on the device and on the processors."""
        found = zip(Rows._fields, self.rounded("cpu"), self.rounded(device), strict=True)
        return [name for name, one, other in found if not torch.equal(bits(one), bits(other))]

    def seconds(self, device: str, times: int = 20) -> float:
        """Of one rounding in one thread, the median."""
        order, grid, rows = self.on(device)
        spent = []
        for _ in range(times + 3):
            _wait(device)
            began = time.perf_counter()
            round_columns(self.format_, rows, order, grid)
            _wait(device)
            spent.append(time.perf_counter() - began)
        return statistics.median(spent[3:])

    def on(self, device: str) -> Any:
        """`order`, `grid` and `rows` there, copied."""

        def there(parts: Any) -> Any:
            return type(parts)(*(part.to(device, copy=True) if isinstance(part, Tensor) else part for part in parts))

        return there(self.order), there(self.grid), there(self.rows)


def rounding_case(format_: GridFormat, columns: int, num_rows: int, *, seed: int) -> RoundingCase:
    """Random numbers, with some that no network should have: a scale of zero, an infinite weight and one that isn't a number."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    upper = torch.triu(0.2 * random(columns, columns))
    upper.diagonal().abs_().add_(0.5)
    passed = (1 / upper.diagonal())[:, None, None].contiguous()
    place = torch.randperm(SPAN, generator=generator)[:columns]
    order = Order(upper.contiguous(), passed, passed * passed, torch.rand(columns, generator=generator), place)
    groups = SPAN // format_.group
    scale = 0.3 * random(groups, num_rows)
    scale[0, 0] = 0
    offset = random(groups, num_rows) if format_.offset_half else torch.zeros(groups, num_rows)
    grid = Grid(format_.levels, format_.group, scale, torch.where(scale == 0, 0, 1 / scale), offset)
    weights = random(columns, num_rows)
    weights[3, 2], weights[2, 5] = torch.nan, torch.inf
    codes, errors = torch.zeros(columns, num_rows, dtype=torch.uint8), torch.ones(num_rows, dtype=torch.float64)
    rows = Rows(weights, weights + 0.01 * random(columns, num_rows), codes, torch.zeros(columns, num_rows), errors)
    return RoundingCase(format_, order, grid, rows)


def bits(numbers: Tensor) -> Tensor:
    """As integers, all that isn't a number alike."""
    if not numbers.is_floating_point():
        return numbers
    return torch.where(numbers.isnan(), torch.nan, numbers).view(torch.int64 if numbers.dtype == torch.float64 else torch.int32)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
