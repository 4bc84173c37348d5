"""How one stored matrix moves against the gradients of its values: its codes, and what is continuous. What of it when: `trainers.pv`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from anyfit.formats.aqlm import Additive, summed
from anyfit.formats.fitting import HALF_MAX
from anyfit.quantizers.aqlm import WIDTH, gathered, nearest
from anyfit.tuning.coded import Coded, Matrix, Summed

BETA = 0.95
"""Of the mean square of gradients that steps of the buffer are divided by; gradients themselves aren't averaged."""
BETAS = (0.9, 0.95)
"""Of Adam, for the halves and the codebooks."""
TINY = 1e-12
LOOKED_AT = 4
"""Times as many vectors as may get other codes have their nearest ones looked for: the furthest from the buffer often keep theirs."""
FAR = 150
"""Steps in which the codes of codebooks of a matrix's own go as far as they may; in more they go slower. They start near to the
optimum, and are soon further from it than they were where steps stay as long as those of other codes."""

C = TypeVar("C", bound=Coded | Summed)


class Subject(ABC, Generic[C]):
    """One matrix, rows in stored order, on the device of its weights. `pace`: of the codes, as a share of the rate that is given.
    `codes`: as they are now. `changed`: vectors that got other codes in the last step."""

    codes: Tensor
    vector: int
    """Columns that are coded together."""

    def __init__(self, matrix: Matrix[C], share: float, pace: float = 1.0) -> None:
        self.matrix, self.share, self.pace = matrix, share, pace
        self.bits = matrix.coded.format_.bits
        self.device = matrix.weight.device
        self.changed = 0
        self._begin(matrix.coded)
        self._adam = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in self.continuous().items()}
        self.buffer = self.values()
        self._squares = torch.zeros_like(self.buffer)

    @abstractmethod
    def _begin(self, coded: C) -> None:
        """Take over what is stored."""

    @abstractmethod
    def continuous(self) -> dict[str, Tensor]:
        """What moves besides the codes, by name, the very tensors."""

    @abstractmethod
    def values(self) -> Tensor:
        """(outputs, inputs) float32."""

    @abstractmethod
    def coded(self) -> C:
        """As it is stored."""

    @abstractmethod
    def _nearest(self, which: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Codes for the vectors `which` (number,) of all in storage order that come near to `target` (number, vector), (number, codes of a
        vector), and the values that they stand for."""

    @abstractmethod
    def _put(self, which: Tensor, codes: Tensor) -> None:
        """Give these vectors these codes."""

    @abstractmethod
    def _move_rest(self, gradient: Tensor, rate: float, step: int) -> None:
        """A step of Adam, the first being 1, of what is continuous."""

    @property
    def num_vectors(self) -> int:
        return self.buffer.numel() // self.vector

    def parameter(self) -> Tensor:
        """The values as the network has them."""
        return self.matrix.placed(self.values())

    def moved(self) -> dict[str, Tensor]:
        """All that is stored and moves, the very tensors."""
        return {"codes": self.codes, **self.continuous()}

    def averages(self) -> dict[str, Tensor]:
        """What else a step changes, the very tensors."""
        found = {"buffer": self.buffer, "squares": self._squares}
        for name, (mean, square) in self._adam.items():
            found |= {f"mean of {name}": mean, f"square of {name}": square}
        return found

    def follow(self) -> None:
        """What is stored has been replaced."""

    def move(self, gradient: Tensor, rates: Mapping[str, float], step: int) -> None:
        """One step of both kinds, the first being 1, against the gradient of the network's parameter."""
        gradient, slower = self.matrix.taken(gradient), 2 ** min(0.0, 2 - self.bits)
        self._move_rest(gradient, slower * rates["continuous"], step)
        self._squares.mul_(BETA).addcmul_(gradient, gradient, value=1 - BETA)
        towards = gradient / (self._squares / (1 - BETA**step)).sqrt_().add_(TINY)
        self.buffer.sub_(towards, alpha=slower * self.pace * rates["codes"] * float(self.buffer.norm() / towards.norm().clamp_min(TINY)))
        self.changed = self._choose(self.share)

    def _choose(self, share: float) -> int:
        """New codes for the vectors that come nearest to the buffer by them, of those that are furthest from it. How many changed."""
        away = (self.buffer - self.values()).square_().unflatten(1, (-1, self.vector)).sum(-1).flatten()
        wanted = max(1, round(share * len(away)))
        looked_at = away.topk(min(len(away), LOOKED_AT * wanted)).indices
        target = self.buffer.reshape(-1, self.vector)[looked_at]
        codes, values = self._nearest(looked_at, target)
        gain = away[looked_at] - (target - values).square_().sum(1)
        best = gain.topk(min(wanted, len(gain))).indices
        best = best[gain[best] > 0]
        own, chosen = self.codes.view(self.num_vectors, -1), looked_at[best]
        changed = int((own[chosen] != codes[best]).any(1).sum())
        self._put(chosen, codes[best])
        return changed

    def _adam_step(self, name: str, gradient: Tensor, rate: float, step: int) -> None:
        mean, square = self._adam[name]
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        corrected = (square / (1 - BETAS[1] ** step)).sqrt_().add_(TINY)
        self.continuous()[name].sub_(mean / corrected, alpha=rate / (1 - BETAS[0] ** step))


class GridSubject(Subject[Coded]):
    """Codes on a grid; its halves move."""

    def _begin(self, coded: Coded) -> None:
        self.format_, self.vector = coded.format_, coded.format_.vector
        self.codes = coded.codes.clone().to(self.device)
        self.by_code = self.format_.levels.to(self.device)
        self.scale, self.offset = coded.scales.scale.to(self.device), coded.scales.offset.to(self.device)
        self.levels = self.by_code[self.codes.int()]
        names = dict.fromkeys(half for half in (self.format_.scale_half, self.format_.offset_half) if half)
        self.halves = {name: torch.zeros(coded.scales.stored[name].shape, device=self.device) for name in names}  # logarithms of factors

    def continuous(self) -> dict[str, Tensor]:
        return self.halves

    def values(self) -> Tensor:
        scale, offset = self._grid()
        return (self.levels.unflatten(1, (-1, self.format_.group)) * scale.unsqueeze(-1) - offset.unsqueeze(-1)).flatten(1)

    def follow(self) -> None:
        self.levels = self.by_code[self.codes.int()]

    def coded(self) -> Coded:
        stored = dict(self.matrix.coded.scales.stored)
        for name, half in self.halves.items():
            old = stored[name]
            stored[name] = (old.float() * half.exp().cpu()).clamp_(-HALF_MAX, HALF_MAX).to(old.dtype)
        return Coded(self.format_, self.codes.cpu(), self.format_.assemble(stored) if self.halves else self.matrix.coded.scales)

    def _nearest(self, which: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self.format_.group // self.vector
        scale, offset = (part.repeat_interleave(vectors, 1).flatten()[which, None] for part in self._grid())
        levels = (target + offset) * torch.where(scale == 0, 0, 1 / scale)
        codes = self.format_.codes(levels.T.cpu(), torch.eye(self.vector)).T.to(self.device)
        return codes, self.by_code[codes.int()] * scale - offset

    def _put(self, which: Tensor, codes: Tensor) -> None:
        self.codes.view(-1, self.vector)[which] = codes
        self.levels.view(-1, self.vector)[which] = self.by_code[codes.int()]

    def _move_rest(self, gradient: Tensor, rate: float, step: int) -> None:
        scale, offset = self._grid()
        grouped = gradient.unflatten(1, (-1, self.format_.group))
        sums = {self.format_.scale_half: (grouped * self.levels.unflatten(1, (-1, self.format_.group))).sum(-1) * scale}
        by_offset = -grouped.sum(-1) * offset
        sums[self.format_.offset_half] = sums.get(self.format_.offset_half, 0) + by_offset
        for name, half in self.halves.items():
            self._adam_step(name, sums[name].unflatten(1, (half.shape[1], -1)).sum(-1), rate, step)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scales and offsets as they are now, (outputs, groups)."""
        return self.scale * self._factor(self.format_.scale_half), self.offset * self._factor(self.format_.offset_half)

    def _factor(self, name: str | None) -> Tensor | float:
        if name is None:
            return 1.0
        half = self.halves[name]
        return half.exp().repeat_interleave(self.scale.shape[1] // half.shape[1], 1)


class SummedSubject(Subject[Summed]):
    """Codes of additive codebooks, which move with the scales of the rows."""

    def _begin(self, coded: Summed) -> None:
        self.format_, self.vector = coded.format_, coded.format_.group
        self.codes = coded.parts.codes.clone(memory_format=torch.contiguous_format).to(self.device)
        self.codebooks, self.scales = coded.parts.codebooks.float().to(self.device), coded.parts.scales.float().to(self.device)
        self.by = torch.zeros_like(self.scales)  # logarithms of what the scales are multiplied by
        self._unit = float(self.codebooks.square().mean().sqrt())

    def continuous(self) -> dict[str, Tensor]:
        return {"codebooks": self.codebooks, "scales": self.by}

    def values(self) -> Tensor:
        return summed(self.codebooks, self.codes).mul_(self._scales().unsqueeze(1))

    def coded(self) -> Summed:
        codebooks, scales = (part.clamp(-HALF_MAX, HALF_MAX).half().cpu() for part in (self.codebooks, self._scales()))
        return Summed(self.format_, Additive(codebooks, scales, self.codes.cpu()))

    def _scales(self) -> Tensor:
        return self.scales * self.by.exp()

    def _nearest(self, which: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        scale, own = self._scales()[which // self.codes.shape[1], None], self.codes.view(self.num_vectors, -1)[which]
        metric = torch.eye(self.vector, device=self.device)
        codes = nearest(self.codebooks, metric, target * torch.where(scale == 0, 0, 1 / scale), own, WIDTH)
        return codes, summed(self.codebooks, codes.unsqueeze(1)) * scale

    def _put(self, which: Tensor, codes: Tensor) -> None:
        self.codes.view(self.num_vectors, -1)[which] = codes

    def _move_rest(self, gradient: Tensor, rate: float, step: int) -> None:
        by_scale = (gradient * self.values()).sum(1)
        by_entry = gathered(gradient * self._scales().unsqueeze(1), self.codes)
        self._adam_step("codebooks", by_entry, rate * self._unit, step)
        self._adam_step("scales", by_scale, rate, step)


AnySubject = GridSubject | SummedSubject


def subject(matrix: Matrix[Coded | Summed], share: float, num_steps: int) -> AnySubject:
    """`share` of its vectors that may get other codes in a step, of so many."""
    if isinstance(matrix.coded, Summed):
        return SummedSubject(cast(Matrix[Summed], matrix), share, min(1.0, FAR / num_steps))
    return GridSubject(cast(Matrix[Coded], matrix), share)
