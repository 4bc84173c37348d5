"""Signed gradient descent on the codes and the halves of a whole network at once.

Paper: "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (SignRound, AutoRound),
arXiv 2309.05516. Each weight has a latent, in levels, which rounds to its code. The gradient of the loss passes through
the rounding as if it weren't there; latents move by its sign, at a rate that falls linearly to zero. The scales move
along, by factors of the halves that they are proportional to.

Differences from the paper, and why:

* The loss is the divergence of the network's predictions from the original's, not each block's squared error: errors
  of one block are made good by others, and what doesn't reach the predictions costs nothing.
* It starts from a solution that is good already (GPTQ's), and each latent between its code and the original weight, where
  it still rounds to its code. So a weight whose code compensated for others is the first to turn back where that was
  wrong, and one whose code is its nearest has as far to go as in plain rounding.
* Batches are small: at the same cost, many noisy steps do better than few exact ones.
* Finer grids move slower, in levels, in proportion to their number of levels: they start nearer to the optimum.
* Entries of codebooks keep their codes, and grids whose scales are powers of two their scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from anyfit.devices import repeatable
from anyfit.formats.base import GridFormat, Scales, nearest
from anyfit.formats.fitting import HALF_MAX
from anyfit.progress import Progress
from anyfit.tasks.language import Logits, Reference, kl
from anyfit.tuning.coded import Coded, Matrix, Tuned


@dataclass(frozen=True)
class Settings:
    """How far and how long.

    `num_segments` that are read in all, repeats counted, `batch_size` a step. `rate`: how far a latent moves in the first
    step, in levels of a grid of four; `half_rate`: the logarithm of a half, likewise. `lean`: how far a latent may start
    towards the original weight, as a share of the way from its code's level to the border of what rounds to it. Near the
    border (0.98) is best in hundreds of steps; in few, codes there flip at random and there is no time to mend it (0.5).
    `seed`: of the order of the text.
    """

    num_segments: int = 100
    batch_size: int = 2
    rate: float = 0.01
    half_rate: float = 0.005
    lean: float = 0.75
    seed: int = 0

    @property
    def num_steps(self) -> int:
        return self.num_segments // self.batch_size


def tune(
    network: PreTrainedModel,
    matrices: Mapping[str, Matrix[Coded]],
    reference: Reference,
    held_out: Reference,
    *,
    settings: Settings,
    progress: Progress,
) -> Tuned:
    """Move codes and halves of `matrices` (by parameter name) so that the network predicts what the original does.

    `network` runs with their values in place of its own parameters and is never changed; whatever else the configuration
    has in low precision must be in it already. `reference` and `held_out`: the original's predictions on the text to tune on
    and on the text that decides whether the result is kept: where it didn't help, the matrices are those given, and `after` equals
    `before`. Deterministic for a number of threads.
    """
    sheets = _sheets(matrices, settings)
    before = kl(_logits(network, _values(sheets)), held_out)
    _descend(network, sheets, reference, settings, progress)
    tuned = {name: coded for sheet in sheets for name, coded in sheet.coded().items()}
    stored = _sheets({name: replace(matrix, coded=tuned[name]) for name, matrix in matrices.items()}, settings)
    after = kl(_logits(network, _values(stored)), held_out)
    if after >= before:
        return Tuned({name: matrix.coded for name, matrix in matrices.items()}, before, before)
    return Tuned({name: tuned[name] for name in matrices}, before, after)


def _descend(network: PreTrainedModel, sheets: Sequence[_Sheet], reference: Reference, settings: Settings, progress: Progress) -> None:
    batches = _batches(len(reference.tokens), settings.batch_size, Generator().manual_seed(settings.seed))
    with repeatable(network.device), progress.stage("tune", settings.num_steps) as stage:
        for step, batch in zip(range(settings.num_steps), batches, strict=False):
            values = {name: value.requires_grad_() for name, value in _values(sheets).items()}
            loss = reference.divergence(_logits(network, values)(reference.tokens[batch]), batch)
            gradients = dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))
            for sheet in sheets:
                sheet.move(gradients, 1 - step / settings.num_steps)
            stage.advance(detail=f"KL {float(loss.detach()):.4f}")


def _logits(network: PreTrainedModel, values: Mapping[str, Tensor]) -> Logits:
    """The network with these values of its parameters."""
    return lambda tokens: functional_call(network, dict(values), kwargs={"input_ids": tokens.to(network.device), "use_cache": False}).logits


def _values(sheets: Iterable[_Sheet]) -> dict[str, Tensor]:
    return {name: value for sheet in sheets for name, value in sheet.parameters().items()}


def _batches(num_segments: int, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """Indices of segments, for ever: each once before any comes again."""
    while True:
        yield from torch.randperm(num_segments, generator=generator).split(batch_size)


class _Sheet:
    """All matrices of one format, as one tensor of groups: a step costs a few operations, however many matrices there are."""

    def __init__(self, format_: GridFormat, matrices: Mapping[str, Matrix[Coded]], settings: Settings) -> None:
        self.format_, self.matrices, self.settings = format_, matrices, settings
        coded, where = [matrix.coded for matrix in matrices.values()], next(iter(matrices.values())).weight.device
        codes = torch.cat([c.codes.reshape(-1, format_.group) for c in coded]).to(where)
        self.scale = torch.cat([c.scales.scale.reshape(-1, 1) for c in coded]).to(where)
        self.offset = torch.cat([c.scales.offset.reshape(-1, 1) for c in coded]).to(where)
        self.by_code = format_.levels.to(where)
        self.levels = self.by_code[codes.long()]
        ordered = self.by_code.sort().values
        self.spacing = float(ordered[-1] - ordered[0]) / (len(ordered) - 1)
        self.ends = float(ordered[0]) - self.spacing / 2, float(ordered[-1]) + self.spacing / 2
        self.latent = self._near_original(codes, settings.lean)
        # Logarithms of what each half is multiplied by, (halves, 1).
        halves = dict.fromkeys(half for half in (format_.scale_half, format_.offset_half) if half)
        self.factors = {half: torch.zeros(sum(c.scales.stored[half].numel() for c in coded), 1, device=where) for half in halves}

    def parameters(self) -> dict[str, Tensor]:
        """The values as they are now, as the network's parameters."""
        scale, offset = self._grid()
        values = (self.levels * scale).sub_(offset)
        return {name: matrix.placed(part) for (name, matrix), part in zip(self.matrices.items(), self._parts(values), strict=True)}

    def move(self, gradients: Mapping[str, Tensor], remaining: float) -> None:
        """One step against the gradients of the network's parameters; `remaining` of the way is ahead, from 1 to 0."""
        slower = remaining * 4 / len(self.format_.levels)
        gradient = torch.cat([m.taken(gradients[name]).reshape(-1, self.format_.group) for name, m in self.matrices.items()])
        scale, offset = self._grid()
        sums = {self.format_.scale_half: (gradient * self.levels).sum(1, keepdim=True) * scale}
        by_offset = -gradient.sum(1, keepdim=True) * offset
        sums[self.format_.offset_half] = sums.get(self.format_.offset_half, 0) + by_offset
        for half, factor in self.factors.items():
            factor.sub_(sums[half].view(len(factor), -1).sum(1, keepdim=True).sign_(), alpha=self.settings.half_rate * slower)
        if self.format_.vector == 1:
            self.latent.sub_((gradient * scale).sign_(), alpha=self.settings.rate * slower * self.spacing).clamp_(*self.ends)
            self.levels = self.by_code[self._codes().long()]

    def coded(self) -> dict[str, Coded]:
        """Every matrix as it is stored."""
        codes = self._parts(self._codes().cpu()) if self.format_.vector == 1 else (matrix.coded.codes for matrix in self.matrices.values())
        scales = self._scales()
        return {name: Coded(self.format_, part.clone(), scales[name]) for name, part in zip(self.matrices, codes, strict=True)}

    def _near_original(self, codes: Tensor, lean: float) -> Tensor:
        """Latents as near to the original weights as they can be and still round to `codes` (groups, columns)."""
        ordered, order = self.by_code.sort(stable=True)
        borders = torch.cat([ordered.new_tensor([self.ends[0]]), (ordered[1:] + ordered[:-1]) / 2, ordered.new_tensor([self.ends[1]])])
        lowest, highest = torch.empty_like(ordered), torch.empty_like(ordered)
        lowest[order] = ordered + lean * (borders[:-1] - ordered)
        highest[order] = ordered + lean * (borders[1:] - ordered)
        weight = torch.cat([matrix.weight.reshape(-1, self.format_.group) for matrix in self.matrices.values()])
        target = torch.where(self.scale == 0, self.levels, (weight + self.offset) / self.scale)
        return target.clamp(lowest[codes.long()], highest[codes.long()])

    def _codes(self) -> Tensor:
        return nearest(self.by_code, self.format_.uniform, self.latent)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scales and offsets as they are now, (groups, 1), but for the rounding of the halves."""
        return self.scale * self._factor(self.format_.scale_half), self.offset * self._factor(self.format_.offset_half)

    def _factor(self, half: str | None) -> Tensor | float:
        """What each group's scale or offset is multiplied by, (groups, 1)."""
        if half is None:
            return 1.0
        factor = self.factors[half]
        return factor.exp().expand(-1, len(self.scale) // len(factor)).reshape(-1, 1)

    def _scales(self) -> dict[str, Scales]:
        """Of every matrix, with its halves rounded."""
        scales = {name: matrix.coded.scales for name, matrix in self.matrices.items()}
        for half, factor in self.factors.items():
            sizes = [matrix.coded.scales.stored[half].numel() for matrix in self.matrices.values()]
            for (name, matrix), part in zip(self.matrices.items(), factor.exp().cpu().view(-1).split(sizes), strict=True):
                old = matrix.coded.scales.stored[half]
                new = (old.float() * part.view_as(old)).clamp(-HALF_MAX, HALF_MAX).to(old.dtype)
                scales[name] = replace(scales[name], stored={**scales[name].stored, half: new})
        return {name: self.format_.assemble(entry.stored) if self.factors else entry for name, entry in scales.items()}

    def _parts(self, groups: Tensor) -> Iterator[Tensor]:
        """Each matrix's (outputs, inputs) of a tensor of all groups."""
        shapes = [matrix.weight.shape for matrix in self.matrices.values()]
        parts = groups.view(-1).split([shape.numel() for shape in shapes])
        return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _sheets(matrices: Mapping[str, Matrix[Coded]], settings: Settings) -> list[_Sheet]:
    by_format: dict[str, dict[str, Matrix[Coded]]] = {}
    for name, matrix in matrices.items():
        by_format.setdefault(matrix.coded.format_.name, {})[name] = matrix
    return [_Sheet(next(iter(group.values())).coded.format_, group, settings) for group in by_format.values()]
