"""Structures by what their columns weigh times how large their inputs are.

Paper: "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695: the score of a single weight is
|w_ij| ‖x_j‖. Here a structure has the sum of its weights' scores; the paper removes single weights, and compares them within a row.
"""

from __future__ import annotations

from torch import Tensor

from anyfit.importance.base import Importance, by_score


class Wanda(Importance):
    def __init__(self, name: str, *, repairs: bool) -> None:
        self.name, self.repairs = name, repairs

    def order(self, weight: Tensor, moments: Tensor, size: int) -> Tensor:
        return by_score(weight_scores(weight, moments).sum(0).unflatten(0, (-1, size)).sum(1))


def weight_scores(weight: Tensor, moments: Tensor) -> Tensor:
    """|w_ij| times the root of x_j's mean square, (outputs, inputs) float64."""
    return weight.double().abs() * moments.diagonal().double().clamp_min(0).sqrt()


IMPORTANCE = Wanda("wanda", repairs=False)
REPAIRED = Wanda("wanda_repaired", repairs=True)
