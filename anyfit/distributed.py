"""Several processes that make one family. `torchrun --nproc-per-node N -m anyfit fit ...` starts them; they share one disk.

Who does what follows from numbers alone, and sums are formed so that their order doesn't matter: the family is the same,
byte by byte, whatever the number of processes.
"""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from anyfit.core.errors import UserError
from anyfit.core.memory import release, return_at_once

T = TypeVar("T")
U = TypeVar("U")
_PATIENCE = timedelta(days=7)
"""For one another. A process that fails ends all: torchrun sees to it."""


@dataclass(frozen=True)
class Group:
    """All processes of a run, and which of them this is. By itself: one that does everything."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that decides, writes what is written once, and speaks to the user."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of some items, neighbours."""
        return items[len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size]

    def owns(self, index: int) -> bool:
        """Whether this process does the piece of work with this number."""
        return index % self.size == self.rank

    def wait(self) -> None:
        """Until all are here."""
        if not self.alone:
            dist.barrier()

    def add(self, tensor: Tensor, to: int) -> None:
        """Add up all processes' tensors, in place, in the process `to`; what is left in the others is of no use."""
        if not self.alone:
            there = tensor.cpu()  # gloo adds up in the machine's own memory
            dist.reduce(there, to)
            tensor.copy_(there)

    def gathered(self, item: T) -> list[T]:
        """What each process has, in order."""
        if self.alone:
            return [item]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item)
        return found

    def told(self, item: T) -> T:
        """What the first process has."""
        if self.alone:
            return item
        found = [item]
        dist.broadcast_object_list(found)
        return found[0]

    def each(self, items: Sequence[T], made: Callable[[T], U]) -> list[U]:
        """What is made of each item, known to all; each is made by one process."""
        found = self.gathered({index: made(item) for index, item in enumerate(items) if self.owns(index)})
        return [found[index % self.size][index] for index in range(len(items))]

    def summed(self, parts: Sequence[T], made: Callable[[T], Mapping[str, Tensor]], *, in_step: bool = False) -> dict[str, Tensor]:
        """The sum of the float32 tensors that are made of each part, under the same names of all parts.

        Each part's are made by one process; they are added up in the order of the parts, so that the sum is the same to the bit in all
        processes and for any number of them. A process holds those of one other at a time. `in_step`: what makes them is `sharded`, so a
        process that has no part left makes the last one's, too, for nothing.
        """
        total: dict[str, Tensor] = {}
        for start in range(0, len(parts), self.size):
            own, last = start + self.rank, min(start + self.size, len(parts))
            mine = dict(made(parts[min(own, last - 1)])) if own < last or in_step else {}
            for found in [mine] if self.alone else self._in_order(mine, last - start):
                for name, value in found.items():
                    total[name] = total[name] + value if name in total else value
        return total

    def shard(self, block: nn.Module) -> None:
        """Keep a part of what isn't trained of a block in each process, whose parameters it has to be in. Parts are put together while the
        block runs, forth or back, so that all processes run it at the same time from now on; never in inference mode, as the first pass
        makes what parts are gathered into. What is trained stays whole: its gradients are `summed`, in an order of their own. On the CPU
        only: gloo gathers in the machine's own memory."""
        if self.alone:
            return
        from torch.distributed.fsdp import fully_shard

        return_at_once()  # blocks that were gathered: kept by the C library, they take more than what is shared out saves
        trained = {value for value in block.parameters() if value.requires_grad}
        fully_shard(block, mesh=_mesh(self.size), reshard_after_forward=True, ignored_params=trained)
        release()

    def _in_order(self, own: Mapping[str, Tensor], number: int) -> Iterator[dict[str, Tensor]]:
        """The tensors of the first `number` processes. One that has none learns their names and shapes from the first."""
        known = self.told([(name, value.shape, value.device.type) for name, value in own.items()])
        sizes = [shape.numel() for _, shape, _ in known]
        for rank in range(number):
            flat = torch.cat([own[name].flatten().cpu() for name, _, _ in known]) if rank == self.rank else torch.empty(sum(sizes))
            dist.broadcast(flat, rank)
            parts = zip(known, flat.split(sizes), strict=True)
            yield {name: part.view(shape).to(where) for (name, shape, where), part in parts}


@cache
def _mesh(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,))


ALONE = Group()


@cache
def group() -> Group:
    """As torchrun's environment says. Raises `UserError` where the processes don't find each other."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"The {size} processes don't find each other: {error}.", remedy="Start them with torchrun.") from error
    atexit.register(dist.destroy_process_group)
    return Group(dist.get_rank(), size)


def exact(values: Tensor, largest: float) -> Tensor:
    """Float64 numbers rounded to whole multiples of one power of two, so that adding up to 2048 such tensors, none of whose
    numbers exceeds `largest` in magnitude, is exact in any order. What is lost is below 2⁻⁴¹ of `largest`."""
    # Adding 1.5 * 2⁵² steps leaves no room for less than a step.
    anchor = math.ldexp(1.5, math.frexp(largest)[1] + 11)
    return values.double().add_(anchor).sub_(anchor)
