"""Structures by the norm of the columns that read them: what is small is removed. The inputs aren't looked at."""

from __future__ import annotations

from torch import Tensor

from anyfit.importance.base import Importance, by_score


class Magnitude(Importance):
    def __init__(self, name: str, *, repairs: bool) -> None:
        self.name, self.repairs = name, repairs

    def order(self, weight: Tensor, moments: Tensor, size: int) -> Tensor:
        return by_score(squares(weight, size))


def squares(weight: Tensor, size: int) -> Tensor:
    """Of each structure of `size` columns the sum, (structures,) float64."""
    return weight.double().square().sum(0).unflatten(0, (-1, size)).sum(1)


IMPORTANCE = Magnitude("magnitude", repairs=False)
REPAIRED = Magnitude("magnitude_repaired", repairs=True)
