"""Masks of single weights: the plain one-shot sparsity that every other method has to beat.

Papers: "The Emergence of Essential Sparsity in Large Pre-trained Models", arXiv 2306.03805 (all weights of the network in one pool,
by magnitude; N:M along the inputs); "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695 (|w| times
the norm of the input, compared within a row). Scores are |w|, or `wanda.weight_scores`.

Differences from the papers: a pool of all weights can empty a small matrix, so each keeps a floor; and patterns say how many weights of
a group are *kept*, where the papers' code says how many are zeroed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def keep_global(scores: Mapping[str, Tensor], density: float, floor: float = 0.0) -> dict[str, Tensor]:
    """Masks (True: kept) of the highest scores of all matrices together: round(density * weights) of them in all, of which each
    matrix keeps round(floor * its weights) at least.

    `scores`: {name: (outputs, inputs)}, any one type. Of equal scores the first is kept. `floor` mustn't exceed `density`.
    """
    assert 0 <= floor <= density <= 1, (floor, density)
    flat = {name: own.flatten() for name, own in scores.items()}
    masks = {name: keep_highest(own, round(floor * own.numel())) for name, own in flat.items()}
    number = round(density * sum(own.numel() for own in flat.values())) - sum(int(mask.sum()) for mask in masks.values())
    lowest = [own.masked_fill(masks[name], -torch.inf) for name, own in flat.items()]
    more = keep_highest(torch.cat(lowest), max(0, number)).split([own.numel() for own in lowest])
    return {name: (masks[name] | chosen).view_as(scores[name]) for name, chosen in zip(masks, more, strict=True)}


def keep_uniform(scores: Tensor, density: float) -> Tensor:
    """A mask (True: kept) of the round(density * inputs) highest scores of every row (outputs, inputs)."""
    return keep_highest(scores, round(density * scores.shape[-1]))


def keep_of_group(scores: Tensor, keep: int, group: int) -> Tensor:
    """A mask (True: kept) of the `keep` highest scores in each `group` weights that lie side by side in a row (outputs, inputs)."""
    assert 0 <= keep <= group and scores.shape[-1] % group == 0, (keep, group, tuple(scores.shape))
    return keep_highest(scores.unflatten(-1, (-1, group)), keep).flatten(-2)


def keep_highest(scores: Tensor, number: int) -> Tensor:
    """A mask of the `number` highest along the last dimension; of equals the first."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :number]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, best, True)
