"""PV-Tuning: codes and scales of a whole network, tuned by turns, a small part of the codes at a time.

Paper: "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression", arXiv 2405.14852. A step of gradient moves
what is continuous (P). For the codes (V) the loss is linear near where it is, so the best codes are those nearest to the weights
as a step of gradient would have them. A step over all codes must be so short that none changes; one over those few whose weights
want to move furthest may be long. Those are found in a buffer of weights that the gradients move as if there were no codes, as in
the authors' code, where this is the default. With all codes in every step it is straight-through estimation, and the buffer what
quantisation-aware training trains.

Differences from the paper, and why:

* The representation is any grid format's: what the paper calls a group is what one entry of the codebook stands for, a vector of
  columns, or a single column of a scalar format. Codebooks are the format's own and stay; the continuous parameters are the halves
  that scales and offsets are proportional to. So what is tuned is what a runtime's file holds.
* The loss is the divergence of the network's predictions from the original's.
* Of the vectors that want to move furthest, those move that come nearest to where they want to: many that are far have no nearer code.
* Learning rates fall linearly to zero, and are lower for finer grids, which start nearer to the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.formats.fitting import HALF_MAX
from anyfit.progress import Progress
from anyfit.tasks.language import Reference, kl
from anyfit.tuning.coded import Coded, Matrix
from anyfit.tuning.descent import Tuned, descend, logits, running

BETA = 0.95
"""Of the mean square of gradients that steps of the buffer are divided by; gradients themselves aren't averaged."""
BETAS = (0.9, 0.95)
"""Of Adam, for the halves."""
TINY = 1e-12
LOOKED_AT = 4
"""Times as many vectors as may get other codes have their nearest ones looked for: the furthest from the buffer often keep theirs."""


@dataclass(frozen=True)
class Settings:
    """`share` of the vectors of each matrix that may get other codes in a step: 1.0 is straight-through estimation, 0.01 the paper's.

    `code_rate`: a step of the buffer as a share of its norm, `half_rate`: of Adam, for the logarithms of the halves; both at two bits a
    weight, and half as much with each bit more.
    """

    num_steps: int = 150
    batch_size: int = 4
    share: float = 0.03
    code_rate: float = 0.03
    half_rate: float = 5e-3
    seed: int = 0


def tune(
    network: PreTrainedModel,
    matrices: Mapping[str, Matrix],
    reference: Reference,
    held_out: Reference,
    *,
    settings: Settings,
    progress: Progress,
) -> Tuned:
    """As `signround.tune`, which see; but whether the result is better is left to whoever asks."""
    subjects = [_Subject(name, matrix, settings) for name, matrix in matrices.items()]
    before = kl(running(network, subjects), held_out)
    num_vectors = sum(subject.num_vectors for subject in subjects)
    descend(
        network,
        subjects,
        reference,
        num_steps=settings.num_steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=progress,
        told=lambda: f", {sum(subject.changed for subject in subjects) / num_vectors:.2%} of codes changed",
    )
    tuned = {subject.name: subject.coded() for subject in subjects}
    subjects.clear()  # before the stored values are there beside them
    stored = {name: m.placed(tuned[name].format_.decode(tuned[name].data).to(m.weight.device)) for name, m in matrices.items()}
    return Tuned(tuned, before, kl(logits(network, stored), held_out))


class _Subject:
    """One matrix, rows in stored order, on the device of its weights. `changed`: vectors that got other codes in the last step."""

    def __init__(self, name: str, matrix: Matrix, settings: Settings) -> None:
        self.name, self.matrix, self.settings, self.format_ = name, matrix, settings, matrix.coded.format_
        self.changed = 0
        self.device = matrix.weight.device
        scales = matrix.coded.scales
        self.codes = matrix.coded.codes.clone().to(self.device)
        self.by_code = self.format_.levels.to(self.device)
        self.scale, self.offset = scales.scale.to(self.device), scales.offset.to(self.device)
        self.levels = self.by_code[self.codes.int()]
        names = dict.fromkeys(half for half in (self.format_.scale_half, self.format_.offset_half) if half)
        self.halves = {name: torch.zeros(scales.stored[name].shape, device=self.device) for name in names}
        self._adam = {name: (torch.zeros_like(half), torch.zeros_like(half)) for name, half in self.halves.items()}
        self.buffer = self.values()
        self._squares = torch.zeros_like(self.buffer)
        self._step = 0

    @property
    def num_vectors(self) -> int:
        return self.codes.numel() // self.format_.vector

    def values(self) -> Tensor:
        """(outputs, inputs) float32."""
        scale, offset = self._grid()
        return (self.levels.unflatten(1, (-1, self.format_.group)) * scale.unsqueeze(-1) - offset.unsqueeze(-1)).flatten(1)

    def parameters(self) -> dict[str, Tensor]:
        return {self.name: self.matrix.placed(self.values())}

    def move(self, gradients: Mapping[str, Tensor], remaining: float) -> None:
        """One step of both kinds."""
        gradient, settings = self.matrix.taken(gradients[self.name]), self.settings
        self._step += 1
        remaining *= 2 ** min(0.0, 2 - self.format_.bits)
        self._move_halves(gradient, remaining * settings.half_rate)
        self._squares.mul_(BETA).addcmul_(gradient, gradient, value=1 - BETA)
        step = gradient / (self._squares / (1 - BETA**self._step)).sqrt_().add_(TINY)
        self.buffer.sub_(step, alpha=remaining * settings.code_rate * float(self.buffer.norm() / step.norm().clamp_min(TINY)))
        self.changed = self._choose(settings.share)

    def coded(self) -> Coded:
        """As it is stored."""
        stored = dict(self.matrix.coded.scales.stored)
        for name, half in self.halves.items():
            old = stored[name]
            stored[name] = (old.float() * half.exp().cpu()).clamp_(-HALF_MAX, HALF_MAX).to(old.dtype)
        return Coded(self.format_, self.codes.cpu(), self.format_.assemble(stored) if self.halves else self.matrix.coded.scales)

    def _choose(self, share: float) -> int:
        """New codes for the vectors that come nearest to the buffer by them, of those that are furthest from it. How many changed."""
        vector, group = self.format_.vector, self.format_.group
        away = (self.buffer - self.values()).square_().unflatten(1, (-1, vector)).sum(-1).flatten()
        wanted = max(1, round(share * len(away)))
        looked_at = away.topk(min(len(away), LOOKED_AT * wanted)).indices
        scale, offset = (part.repeat_interleave(group // vector, 1).flatten()[looked_at, None] for part in self._grid())
        target = self.buffer.reshape(-1, vector)[looked_at]
        levels = (target + offset) * torch.where(scale == 0, 0, 1 / scale)
        codes = self.format_.codes(levels.T.cpu(), torch.eye(vector)).T.to(self.device)
        found = self.by_code[codes.int()]
        gain = away[looked_at] - (target - (found * scale - offset)).square_().sum(1)
        best = gain.topk(min(wanted, len(gain))).indices
        best = best[gain[best] > 0]
        own, chosen = self.codes.view(-1, vector), looked_at[best]
        changed = int((own[chosen] != codes[best]).any(1).sum())
        own[chosen] = codes[best]
        self.levels.view(-1, vector)[chosen] = found[best]
        return changed

    def _move_halves(self, gradient: Tensor, rate: float) -> None:
        """A step of Adam of their logarithms."""
        scale, offset = self._grid()
        grouped = gradient.unflatten(1, (-1, self.format_.group))
        sums = {self.format_.scale_half: (grouped * self.levels.unflatten(1, (-1, self.format_.group))).sum(-1) * scale}
        by_offset = -grouped.sum(-1) * offset
        sums[self.format_.offset_half] = sums.get(self.format_.offset_half, 0) + by_offset
        for name, half in self.halves.items():
            total = sums[name].unflatten(1, (half.shape[1], -1)).sum(-1)
            mean, square = self._adam[name]
            mean.lerp_(total, 1 - BETAS[0])
            square.lerp_(total.square(), 1 - BETAS[1])
            corrected = (square / (1 - BETAS[1] ** self._step)).sqrt_().add_(TINY)
            half.sub_(mean / corrected, alpha=rate / (1 - BETAS[0] ** self._step))

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scales and offsets as they are now, (outputs, groups)."""
        return self.scale * self._factor(self.format_.scale_half), self.offset * self._factor(self.format_.offset_half)

    def _factor(self, name: str | None) -> Tensor | float:
        if name is None:
            return 1.0
        half = self.halves[name]
        return half.exp().repeat_interleave(self.scale.shape[1] // half.shape[1], 1)
