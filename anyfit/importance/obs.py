"""Exact structured optimal brain surgeon: always the structure whose removal costs least, once the others have made it good.

Paper: "ZipLM: Inference-Aware Structured Pruning of Language Models", arXiv 2302.04089, section 3.1. With H the damped second moments
of the inputs, removing structure S of the remaining costs tr(W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ), and changes W and H⁻¹ by

    W ← W - W_S [(H⁻¹)_SS]⁻¹ (H⁻¹)_S,:        H⁻¹ ← H⁻¹ - (H⁻¹)_:,S [(H⁻¹)_SS]⁻¹ (H⁻¹)_S,:

Differences from the paper, and why:

* Scores need G = WᵀW alone, so that G is updated in place of W: the time doesn't grow with the number of outputs. With
  K = (H⁻¹)_:,S [(H⁻¹)_SS]⁻¹ it is G ← G - G_:,S Kᵀ - K G_S,: + K G_SS Kᵀ.
* Both updates are gathered and subtracted from the whole matrices 64 columns at a time, as products of matrices; what the choice of
  the next structure needs of them is kept up to date. That is the same arithmetic, not an approximation.
* The weights at each step of the ladder are solved afresh on what is kept, from one factorisation. These are the weights that the
  updates lead to, without their rounding errors.
* Columns that were never active cost nothing and are removed first. Where they are kept, they stay as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyfit.importance.base import Importance, damped

_COLUMNS_TOGETHER = 64


class OptimalBrainSurgeon(Importance):
    name, repairs = "obs", True

    def order(self, weight: Tensor, moments: Tensor, size: int) -> Tensor:
        counted = weight.double() * (moments.diagonal() != 0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moments)))
        gram = counted.T @ counted
        active, removed = torch.arange(weight.shape[1] // size), []
        while len(active):
            chosen, inverse, gram = _remove_some(inverse, gram, size, max(1, _COLUMNS_TOGETHER // size))
            removed.append(active[chosen])
            active = active[_others(len(active), chosen)]
        return torch.cat(removed).flip(0)


def _remove_some(inverse: Tensor, gram: Tensor, size: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the next `steps` structures, in the order of removal, and leave H⁻¹ and G of the others."""
    structures = len(inverse) // size
    steps = min(steps, structures)
    # H⁻¹ is less UᵀU by now, and G less PᵀQ + QᵀP; rows of these are written as structures are removed.
    u, p, q = (torch.empty(steps * size, len(inverse), dtype=torch.float64) for _ in range(3))
    inverse_blocks, gram_blocks = _diagonal(inverse, size), _diagonal(gram, size)
    chosen: list[int] = []
    for step in range(steps):
        costs = _costs(inverse_blocks, gram_blocks)
        costs[chosen] = torch.inf
        index = structures - 1 - int(costs.flip(0).argmin())
        done, now, own = slice(step * size), slice(step * size, (step + 1) * size), slice(index * size, (index + 1) * size)
        rows = inverse[own] - u[done, own].T @ u[done]
        lower = torch.linalg.cholesky(rows[:, own])
        u[now] = torch.linalg.solve_triangular(lower, rows, upper=False)
        q[now] = torch.linalg.solve_triangular(lower.T, u[now], upper=True)
        gram_rows = gram[own] - p[done, own].T @ q[done] - q[done, own].T @ p[done]
        p[now] = gram_rows - gram_rows[:, own] @ q[now] / 2
        inverse_blocks -= _outer(u[now], u[now])
        product = _outer(p[now], q[now])
        gram_blocks -= product + product.mT
        inverse_blocks[index], gram_blocks[index] = torch.eye(size), 0
        chosen.append(index)
    left = _others(structures, torch.tensor(chosen))
    columns = (left[:, None] * size + torch.arange(size)).flatten()
    u, p, q = u[:, columns], p[:, columns], q[:, columns]
    inverse = inverse[columns][:, columns].addmm_(u.T, u, alpha=-1)
    gram = gram[columns][:, columns].addmm_(p.T, q, alpha=-1).addmm_(q.T, p, alpha=-1)
    return torch.tensor(chosen), inverse, gram


def _costs(inverse: Tensor, gram: Tensor) -> Tensor:
    """tr([(H⁻¹)_SS]⁻¹ G_SS) of every structure, from the diagonal blocks (structures, size, size)."""
    if inverse.shape[-1] == 1:
        return (gram / inverse).flatten()
    return torch.linalg.solve(inverse, gram).diagonal(dim1=1, dim2=2).sum(1)


def _diagonal(matrix: Tensor, size: int) -> Tensor:
    """A copy of the blocks on the diagonal, (structures, size, size)."""
    return matrix.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).movedim(2, 0).contiguous()


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """The blocks on the diagonal of aᵀ b, for rows (size, columns)."""
    size = len(a)
    return a.T.unflatten(0, (-1, size)) @ b.T.unflatten(0, (-1, size)).mT


def _others(number: int, chosen: Tensor) -> Tensor:
    kept = torch.ones(number, dtype=torch.bool)
    kept[chosen] = False
    return kept.nonzero().flatten()


IMPORTANCE = OptimalBrainSurgeon()
