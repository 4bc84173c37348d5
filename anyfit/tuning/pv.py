"""PV-Tuning: codes and scales of a whole network, tuned by turns, a small part of the codes at a time.

Paper: "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression", arXiv 2405.14852. A step of gradient moves
what is continuous (P). For the codes (V) the loss is linear near where it is, so the best codes are those nearest to the weights
as a step of gradient would have them. A step over all codes must be so short that none changes; one over those few whose weights
want to move furthest may be long. Those are found in a buffer of weights that the gradients move as if there were no codes, as in
the authors' code, where this is the default. With all codes in every step it is straight-through estimation, and the buffer what
quantisation-aware training trains.

Differences from the paper, and why:

* The representation is the format's. Of a grid format, what the paper calls a group is what one entry of the codebook stands for, a
  vector of columns, or a single column of a scalar format; codebooks are the format's own and stay; the continuous parameters are the
  halves that scales and offsets are proportional to. Of additive codebooks, as in the paper, they are scales and codebooks. So what is
  tuned is what a runtime's file holds.
* The loss is the divergence of the network's predictions from the original's.
* Of the vectors that want to move furthest, those move that come nearest to where they want to: many that are far have no nearer code.
* A tenth of the vectors may change in a step, not a hundredth, which was behind (docs/benchmarks/train-once.md).
* Learning rates fall linearly to zero, and are lower for finer grids, which start nearer to the optimum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.formats.aqlm import Additive, summed
from anyfit.formats.fitting import HALF_MAX
from anyfit.progress import Progress
from anyfit.quantizers.aqlm import WIDTH, gathered, nearest
from anyfit.tasks.language import Reference, kl
from anyfit.tuning.coded import Coded, Matrix, Summed
from anyfit.tuning.descent import Tuned, descend, logits, running

BETA = 0.95
"""Of the mean square of gradients that steps of the buffer are divided by; gradients themselves aren't averaged."""
BETAS = (0.9, 0.95)
"""Of Adam, for the halves and the codebooks."""
TINY = 1e-12
LOOKED_AT = 4
"""Times as many vectors as may get other codes have their nearest ones looked for: the furthest from the buffer often keep theirs."""


@dataclass(frozen=True)
class Settings:
    """`share` of the vectors of each matrix that may get other codes in a step: 1.0 is straight-through estimation, 0.01 the paper's.

    `code_rate`: a step of the buffer as a share of its norm, `half_rate`: of Adam, for the logarithms of the halves and for entries of
    codebooks, as a share of their root mean square; both at two bits a weight, and half as much with each bit more.
    """

    num_steps: int = 150
    batch_size: int = 4
    share: float = 0.1
    code_rate: float = 0.03
    half_rate: float = 5e-3
    seed: int = 0


def tune(
    network: PreTrainedModel,
    matrices: Mapping[str, Matrix[Coded | Summed]],
    reference: Reference,
    held_out: Reference,
    *,
    settings: Settings,
    progress: Progress,
) -> Tuned:
    """As `signround.tune`, which see; but whether the result is better is left to whoever asks."""
    subjects = [_subject(name, matrix, settings) for name, matrix in matrices.items()]
    before = kl(running(network, subjects), held_out)
    num_vectors = sum(subject.num_vectors for subject in subjects)
    descend(
        network,
        subjects,
        reference,
        settings,
        progress,
        told=lambda: f", {sum(subject.changed for subject in subjects) / num_vectors:.2%} of codes changed",
    )
    tuned = {subject.name: subject.coded() for subject in subjects}
    subjects.clear()  # before the stored values are there beside them
    stored = {name: m.placed(tuned[name].format_.decode(tuned[name].data).to(m.weight.device)) for name, m in matrices.items()}
    return Tuned(tuned, before, kl(logits(network, stored), held_out))


C = TypeVar("C", bound=Coded | Summed)


class Subject(ABC, Generic[C]):
    """One matrix, rows in stored order, on the device of its weights. `codes`: as they are now. `changed`: vectors that got other codes in
    the last step."""

    codes: Tensor
    vector: int
    """Columns that are coded together."""

    def __init__(self, name: str, matrix: Matrix[C], settings: Settings) -> None:
        self.name, self.matrix, self.settings = name, matrix, settings
        self.bits = matrix.coded.format_.bits
        self.device = matrix.weight.device
        self.changed = 0
        self._step = 0
        self._adam: dict[str, tuple[Tensor, Tensor]] = {}
        self._begin(matrix.coded)
        self.buffer = self.values()
        self._squares = torch.zeros_like(self.buffer)

    @abstractmethod
    def _begin(self, coded: C) -> None:
        """Take over what is stored."""

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
    def _move_rest(self, gradient: Tensor, rate: float) -> None:
        """A step of Adam of what is continuous."""

    @property
    def num_vectors(self) -> int:
        return self.buffer.numel() // self.vector

    def parameters(self) -> dict[str, Tensor]:
        return {self.name: self.matrix.placed(self.values())}

    def move(self, gradients: Mapping[str, Tensor], remaining: float) -> None:
        """One step of both kinds."""
        gradient, settings = self.matrix.taken(gradients[self.name]), self.settings
        self._step += 1
        remaining *= 2 ** min(0.0, 2 - self.bits)
        self._move_rest(gradient, remaining * settings.half_rate)
        self._squares.mul_(BETA).addcmul_(gradient, gradient, value=1 - BETA)
        step = gradient / (self._squares / (1 - BETA**self._step)).sqrt_().add_(TINY)
        self.buffer.sub_(step, alpha=remaining * settings.code_rate * float(self.buffer.norm() / step.norm().clamp_min(TINY)))
        self.changed = self._choose(settings.share)

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

    def _adam_step(self, name: str, value: Tensor, gradient: Tensor, rate: float) -> None:
        """In place."""
        mean, square = self._adam.setdefault(name, (torch.zeros_like(value), torch.zeros_like(value)))
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        corrected = (square / (1 - BETAS[1] ** self._step)).sqrt_().add_(TINY)
        value.sub_(mean / corrected, alpha=rate / (1 - BETAS[0] ** self._step))


class GridSubject(Subject[Coded]):
    """Codes on a grid; its halves move."""

    def _begin(self, coded: Coded) -> None:
        self.format_, self.vector = coded.format_, coded.format_.vector
        self.codes = coded.codes.clone().to(self.device)
        self.by_code = self.format_.levels.to(self.device)
        self.scale, self.offset = coded.scales.scale.to(self.device), coded.scales.offset.to(self.device)
        self.levels = self.by_code[self.codes.int()]
        names = dict.fromkeys(half for half in (self.format_.scale_half, self.format_.offset_half) if half)
        self.halves = {name: torch.zeros(coded.scales.stored[name].shape, device=self.device) for name in names}

    def values(self) -> Tensor:
        scale, offset = self._grid()
        return (self.levels.unflatten(1, (-1, self.format_.group)) * scale.unsqueeze(-1) - offset.unsqueeze(-1)).flatten(1)

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

    def _move_rest(self, gradient: Tensor, rate: float) -> None:
        """Of the logarithms of the halves."""
        scale, offset = self._grid()
        grouped = gradient.unflatten(1, (-1, self.format_.group))
        sums = {self.format_.scale_half: (grouped * self.levels.unflatten(1, (-1, self.format_.group))).sum(-1) * scale}
        by_offset = -grouped.sum(-1) * offset
        sums[self.format_.offset_half] = sums.get(self.format_.offset_half, 0) + by_offset
        for name, half in self.halves.items():
            self._adam_step(name, half, sums[name].unflatten(1, (half.shape[1], -1)).sum(-1), rate)

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

    def _move_rest(self, gradient: Tensor, rate: float) -> None:
        by_scale = (gradient * self.values()).sum(1)
        self._adam_step("codebooks", self.codebooks, gathered(gradient * self._scales().unsqueeze(1), self.codes), rate * self._unit)
        self._adam_step("scales", self.by, by_scale, rate)


def _subject(name: str, matrix: Matrix[Coded | Summed], settings: Settings) -> Subject[Coded] | Subject[Summed]:
    if isinstance(matrix.coded, Summed):
        return SummedSubject(name, cast(Matrix[Summed], matrix), settings)
    return GridSubject(name, cast(Matrix[Coded], matrix), settings)
