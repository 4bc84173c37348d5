"""Codebooks, codes and scales of one matrix, each fitted in turn to what its outputs lose (AQLM).

Paper: "Extreme Compression of Large Language Models via Additive Quantization", arXiv 2401.06118, section 3. Minimised is tr(D H Dᵀ),
with D the weights' error and H the mean of x xᵀ.

Differences from the paper, and why:

* Codes of a group are chosen together by a beam over its codebooks, with all other groups of the row as they are now, one group after
  the other; the paper's beam goes over the codes of a whole row. So all rows take their steps side by side, as matrix products. With
  one codebook the choice is exact: the entry nearest in the metric.
* Codebooks and scales come from their least-squares problems (by conjugate gradients, and in closed form), not from steps of Adam.
* The first codebooks are those of residual k-means, as in the paper, weighted by the squares of the scales and by H's diagonal.
* H is damped a little, so that directions which the text didn't show don't run away.
* The last codes and scales are chosen for codebooks as they are stored, in halves. So what is optimised is what the file holds.
* Blocks aren't tuned afterwards: `trainers.pv` does that to the network as a whole.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from anyfit.formats.aqlm import ENTRIES, Additive, AdditiveFormat, summed
from anyfit.formats.base import SPAN
from anyfit.formats.fitting import HALF_MAX, refuse_beyond

DAMPING = 0.05
"""Of H's mean diagonal, as in GPTQ."""
MOST_ROUNDS, ENOUGH = 12, 0.01
"""Scales, codebooks and codes are fitted by turns until a round takes less than this share off the error."""
WIDTH = 8
"""Of the beam."""
BYTES_A_NUMBER = 40
"""Of a matrix, that are held while it is encoded."""
_SAMPLE, _KMEANS_STEPS = 1 << 16, 12
_LEAST_SQUARES_STEPS = 12
_EXACT = 1e-10
"""Of the squared gradient at first: what is left of it then is rounding."""
_NUMBERS_AT_ONCE = 1 << 20
"""Distances to entries that are held together."""


def encode(format_: AdditiveFormat, weight: Tensor, hessian: Tensor) -> Tensor:
    """The bytes of `weight` (rows, columns) for inputs with the second moments `hessian` (columns, columns), where that is."""
    refuse_beyond(format_.name, HALF_MAX, weight)
    fit = Fit(format_, weight.to(hessian.device).contiguous(), damped(hessian))
    for _ in range(MOST_ROUNDS):
        before = fit.error()
        fit.fit_codebooks()
        fit.choose_codes()
        fit.fit_scales()
        if fit.error() > (1 - ENOUGH) * before:
            break
    return format_.pack(fit.stored())


def damped(hessian: Tensor) -> Tensor:
    """A copy with something added to the diagonal; where all inputs were zero, every column matters alike."""
    found, mean = hessian.clone(), hessian.diagonal().mean()
    found.diagonal().add_(torch.where(mean > 0, DAMPING * mean, 1))
    return found


class Fit:
    """A matrix and its parts so far, float32: `codebooks` (codebooks, entries, group), `scales` (rows,), `codes` as they are stored."""

    def __init__(self, format_: AdditiveFormat, weight: Tensor, hessian: Tensor) -> None:
        self.format_, self.weight, self.hessian = format_, weight, hessian
        self.scales = weight.square().mean(1).sqrt_()
        self.codebooks, self.codes = _residual_kmeans(format_, weight * _inverse(self.scales).unsqueeze(1), self.scales, hessian.diagonal())
        self.fit_scales()

    def values(self) -> Tensor:
        """(rows, columns)."""
        return summed(self.codebooks, self.codes) * self.scales.unsqueeze(1)

    def error(self) -> float:
        """tr(D H Dᵀ)."""
        difference = self.weight - self.values()
        return float(((difference @ self.hessian) * difference).sum(dtype=torch.float64))

    def fit_scales(self) -> None:
        """To the least error of each row."""
        sums = summed(self.codebooks, self.codes)
        pushed = sums @ self.hessian
        own = (sums * pushed).sum(1)
        self.scales = torch.where(own > 0, (self.weight * pushed).sum(1) / own, 0)

    def fit_codebooks(self) -> None:
        """Towards the least error, by conjugate gradients, preconditioned by the diagonal of their matrix but for what groups of a row that
        share an entry have in common."""
        hessian, scales = self.hessian, self.scales.unsqueeze(1)
        diagonal = gathered(scales.square() * hessian.diagonal(), self.codes)
        residual = gathered(((self.weight - self.values()) @ hessian).mul_(scales), self.codes)
        ahead = residual * _inverse(diagonal)
        direction, size = ahead.clone(), (residual * ahead).sum()
        enough = float(size) * _EXACT
        for _ in range(_LEAST_SQUARES_STEPS):
            if float(size) <= enough:
                break
            pushed = gathered((summed(direction, self.codes).mul_(scales) @ hessian).mul_(scales), self.codes)
            step = size / (direction * pushed).sum()
            self.codebooks = self.codebooks + step * direction
            residual = residual - step * pushed
            ahead = residual * _inverse(diagonal)
            before, size = size, (residual * ahead).sum()
            direction = ahead + size / before * direction

    def choose_codes(self, width: int = WIDTH) -> None:
        """Anew for each group in turn; none gets worse ones."""
        choose(self.codebooks, self.scales, self.codes, self.weight, self.hessian, width)

    def stored(self) -> Additive:
        """As it is stored; the fit goes on with that."""
        self.codebooks = self.codebooks.clamp(-HALF_MAX, HALF_MAX).half().float()
        self.choose_codes()
        self.fit_scales()
        self.scales = self.scales.clamp(-HALF_MAX, HALF_MAX).half().float()
        return Additive(self.codebooks.half().cpu(), self.scales.half().cpu(), self.codes.cpu())


def gathered(values: Tensor, codes: Tensor) -> Tensor:
    """The transpose of `summed`: of (rows, columns), what falls to each entry, (codebooks, entries, group)."""
    groups = values.reshape(codes.shape[0] * codes.shape[1], -1)
    return torch.stack([_gathered(groups, part.reshape(-1)) for part in codes.unbind(-1)])


def choose(codebooks: Tensor, scales: Tensor, codes: Tensor, weight: Tensor, hessian: Tensor, width: int) -> None:
    """Write better codes into `codes` (rows, groups, codebooks), group after group.

    With all else as it is, a group's sum of entries v costs v K vᵀ - 2 v h in units of its row's squared scale: K is the group's part of
    `hessian`, h what would be right for all columns together.
    """
    group = codebooks.shape[-1]
    scale, inverse = scales.unsqueeze(1), _inverse(scales).unsqueeze(1)
    sums = summed(codebooks, codes)
    ahead = (weight - sums * scale) @ hessian
    for first in range(0, weight.shape[1], SPAN):
        span = slice(first, first + SPAN)
        moved, free, metric = torch.zeros_like(sums[:, span]), ahead[:, span], hessian[span, span]
        for start in range(0, moved.shape[1], group):
            now, place = slice(start, start + group), (first + start) // group
            inner, old = metric[now, now], sums[:, first + start : first + start + group]
            found = nearest(codebooks, inner, torch.addmm(free[:, now] * inverse, old, inner), codes[:, place], width)
            codes[:, place] = found
            moved[:, now] = (summed(codebooks, found.unsqueeze(1)) - old) * scale
            free.addmm_(moved[:, now], metric[now], alpha=-1)
        ahead[:, first + SPAN :].addmm_(moved, hessian[span, first + SPAN :], alpha=-1)


def nearest(codebooks: Tensor, metric: Tensor, wanted: Tensor, now: Tensor, width: int) -> Tensor:
    """Codes (rows, codebooks) of a group, none worse than `now`, found by a beam of `width`: those of least v K vᵀ - 2 v h for their sum of
    entries v, with K the `metric` (group, group) and h a row of `wanted` (rows, group)."""
    most = max(1, _NUMBERS_AT_ONCE // (ENTRIES * (width if len(codebooks) > 1 else 1)))
    return torch.cat([_nearest(codebooks, metric, *part, width) for part in zip(wanted.split(most), now.split(most), strict=True)])


def _nearest(codebooks: Tensor, metric: Tensor, wanted: Tensor, now: Tensor, width: int) -> Tensor:
    """The same of few rows."""
    pushed = codebooks @ metric
    own = (codebooks * pushed).sum(-1).unsqueeze(1) - 2 * (wanted @ codebooks.mT)  # (codebooks, rows, entries)
    costs, chosen = torch.zeros(len(wanted), 1, device=wanted.device), now.new_empty(len(wanted), 1, 0)
    for place, book in enumerate(own):
        total = costs.unsqueeze(-1) + book.unsqueeze(1)  # (rows, beam, entries)
        for earlier in range(place):
            total += (2 * codebooks[earlier] @ pushed[place].T)[chosen[..., earlier].int()]
        most = width if place < len(own) - 1 else 1
        costs, best = total.flatten(1).topk(most, largest=False, sorted=False) if most > 1 else total.flatten(1).min(1, keepdim=True)
        kept = chosen.gather(1, (best // ENTRIES).unsqueeze(-1).expand(-1, -1, place))
        chosen = torch.cat([kept, (best % ENTRIES).to(torch.uint8).unsqueeze(-1)], -1)
    before = _costs(codebooks, pushed, own, now)
    return torch.where((costs < before), chosen[:, 0], now)


def _costs(codebooks: Tensor, pushed: Tensor, own: Tensor, codes: Tensor) -> Tensor:
    """Of codes (rows, codebooks), (rows, 1)."""
    parts = codes.long()
    total = sum(book.gather(1, part.unsqueeze(1)) for book, part in zip(own, parts.unbind(1), strict=True))
    for later in range(1, len(codebooks)):
        for earlier in range(later):
            both = codebooks[earlier][parts[:, earlier]] * pushed[later][parts[:, later]]
            total = total + 2 * both.sum(1, keepdim=True)
    assert isinstance(total, Tensor)
    return total


def _residual_kmeans(format_: AdditiveFormat, rows: Tensor, scales: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Codebooks for `rows` (rows, columns), each for what the ones before it left, and codes. A row's error counts with its squared scale,
    a column's with its `importance` (columns,)."""
    left = rows.reshape(-1, format_.group)
    counted = (scales.square().unsqueeze(1) * importance).view_as(left)
    counted = counted / counted.mean().clamp_min(torch.finfo(torch.float32).tiny)
    some = torch.randperm(len(left), generator=Generator().manual_seed(0))[:_SAMPLE].to(left.device)
    books, codes = [], []
    for _ in range(format_.num_codebooks):
        books.append(_kmeans(left[some], counted[some]))
        codes.append(_assigned(books[-1], left, counted)[0])
        left = left - books[-1][codes[-1].int()]
    return torch.stack(books), torch.stack(codes, -1).view(len(rows), -1, format_.num_codebooks)


def _kmeans(points: Tensor, counted: Tensor) -> Tensor:
    """Centres (entries, group) of `points` (points, group), each number of which counts as `counted`. They start at random points; one
    without any is put where the error is largest."""
    centres = functional.pad(points[:ENTRIES], (0, 0, 0, max(0, ENTRIES - len(points))))
    for _ in range(_KMEANS_STEPS):
        codes, errors = _assigned(centres, points, counted)
        weights = _gathered(counted, codes)
        empty = torch.nonzero(torch.bincount(codes.int(), minlength=ENTRIES) == 0).view(-1)[: len(points)]
        centres = torch.where(weights > 0, _gathered(points * counted, codes) / weights, centres)
        centres[empty] = points[errors.argsort(descending=True, stable=True)[: len(empty)]]
    return centres


def _assigned(centres: Tensor, points: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest centres, uint8 (points,), and squared errors."""
    codes, errors = [], []
    for part, weights in zip(*(whole.split(_NUMBERS_AT_ONCE // ENTRIES) for whole in (points, counted)), strict=True):
        distance, code = (weights @ centres.square().T).addmm_(part * weights, centres.T, alpha=-2).min(1)
        codes.append(code.to(torch.uint8))
        errors.append(distance + (part.square() * weights).sum(1))
    return torch.cat(codes), torch.cat(errors)


def _gathered(values: Tensor, codes: Tensor) -> Tensor:
    """The sums of those of `values` (numbers, width) that have the same of `codes` (numbers,), (entries, width)."""
    sums, index = values.new_zeros(ENTRIES, values.shape[1]), codes.int()
    # Of the two, each is the one that is quick and that always adds up in the same order, on its device.
    return sums.index_put_((index,), values, accumulate=True) if values.is_cuda else sums.index_add_(0, index, values)


def _inverse(values: Tensor) -> Tensor:
    """Of zero, zero."""
    return torch.where(values == 0, 0, 1 / values)
