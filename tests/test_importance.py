"""Orders and ladders against computations that share nothing with them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from anyfit.importance import importances
from anyfit.importance.base import Importance, Repair, damped, squared_error
from anyfit.importance.obs import _costs, _diagonal, _remove_some
from anyfit.importance.sparsity import FLOOR, keep_of_group, keep_uniform, pooled
from anyfit.importance.wanda import weight_scores
from anyfit.structure.masks import Mask
from anyfit.testing.importance import check_importance

OBS = importances.get("obs")
assert isinstance(OBS, Importance)
OF_MATRICES = {name: found for name in importances if isinstance(found := importances.get(name), Importance)}


def layer(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random matrix, and the second moments of correlated inputs that a ReLU gave."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) + 2 * torch.randn(inputs, 8, generator=generator) @ torch.randn(
        8, inputs, generator=generator
    ).div(8)
    x = (torch.randn(4 * inputs, inputs, generator=generator) @ mixing).relu()
    return torch.randn(outputs, inputs, generator=generator), x.T @ x / len(x)


def least_squares(weight: Tensor, hessian: Tensor, columns: Tensor) -> Tensor:
    """The float64 minimiser of tr((W - W') H (W - W')ᵀ) among the matrices with these columns alone."""
    solved = torch.zeros_like(weight, dtype=torch.float64)
    solved[:, columns] = torch.linalg.solve(hessian[columns][:, columns], hessian[columns] @ weight.double().T).T
    return solved


def columns_of(structures: Tensor, size: int) -> Tensor:
    return torch.cat([torch.arange(size * index, size * (index + 1)) for index in structures.tolist()] or [torch.arange(0)])


def greedy(weight: Tensor, hessian: Tensor, size: int) -> list[int]:
    """By definition: remove the structure without which the best matrix is nearest, again and again."""
    active, removed = list(range(weight.shape[1] // size)), []
    while active:
        errors = []
        for candidate in active:
            columns = columns_of(torch.tensor([index for index in active if index != candidate], dtype=torch.int64), size)
            lost = weight.double() - least_squares(weight, hessian, columns)
            errors.append(float(((lost @ hessian) * lost).sum()))
        removed.append(active.pop(errors.index(min(errors))))
    return removed[::-1]


@pytest.mark.parametrize(("inputs", "size"), [(24, 1), (24, 4), (80, 8)])
def test_obs_removes_what_costs_least_by_definition(inputs: int, size: int) -> None:
    weight, moments = layer(10, inputs)
    assert OBS.order(weight, moments, size).tolist() == greedy(weight, damped(moments), size)


@pytest.mark.parametrize("name", importances)
def test_conformance(name: str) -> None:
    check_importance(importances.get(name))


@pytest.mark.parametrize("size", [1, 16])
def test_each_step_is_the_least_squares_of_what_is_kept(size: int) -> None:
    """To 1e-10 before weights are rounded to float32."""
    weight, moments = layer(32, 256)
    order = OBS.order(weight, moments, size)
    columns = columns_of(order, size)
    solved = Repair.of(weight, moments, columns)
    for kept in (1, len(order) // 3, len(order) - 1):
        expected = least_squares(weight, damped(moments), columns[: kept * size])[:, columns[: kept * size]]
        assert (solved.keeping(kept * size) - expected).abs().max() < 1e-10


def test_scores_kept_up_to_date_equal_those_of_the_matrices_themselves() -> None:
    """Structures that are removed together, 64 columns at a time, are the same as one at a time."""
    weight, moments = layer(32, 128)
    inverse, gram = torch.linalg.inv(damped(moments)), weight.double().T @ weight.double()
    chosen, together_inverse, together_gram = _remove_some(inverse, gram, 1, 64)
    active = torch.arange(128)
    for index in chosen.tolist():
        assert int(active[_costs(_diagonal(inverse, 1), _diagonal(gram, 1)).argmin()]) == index
        one, inverse, gram = _remove_some(inverse, gram, 1, 1)
        active = active[active != active[one]]
    assert torch.allclose(inverse, together_inverse, atol=1e-10) and torch.allclose(gram, together_gram, atol=1e-10)


def test_of_near_duplicates_one_stays() -> None:
    """ZipLM's case against scoring once: 32 pairs, 32 removed, and no pair may lose both."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 32, generator=generator).repeat_interleave(2, dim=1)
    x += 0.003 * torch.randn(x.shape, generator=generator)
    weight = torch.randn(48, 64, generator=generator)
    moments = x.T @ x / len(x)
    total = float(((weight @ moments) * weight).sum())

    def lost(name: str) -> tuple[int, float]:
        found = OF_MATRICES[name].ladder(weight, moments, 1)
        return 32 - len({index // 2 for index in found.order[:32].tolist()}), squared_error(weight - found.level(32), moments) / total

    assert lost("obs")[0] == 0 and lost("obs")[1] < 0.002
    assert lost("magnitude")[0] > 5 and lost("wanda_repaired")[0] > 5
    assert lost("wanda_repaired")[1] > 20 * lost("obs")[1]


def test_methods_come_in_the_order_of_what_they_know() -> None:
    weight, moments = layer(128, 256)
    left = {name: importance.ladder(weight, moments, 1).level(128) for name, importance in OF_MATRICES.items()}
    errors = {name: squared_error(weight - level, moments) for name, level in left.items()}
    assert errors["obs"] < min(errors["magnitude_repaired"], errors["wanda_repaired"])
    assert max(errors["magnitude_repaired"], errors["wanda_repaired"]) < errors["wanda"] < errors["magnitude"]


def test_what_was_never_active_goes_first_and_stays_as_it_is_where_it_is_kept() -> None:
    weight, moments = layer(8, 40)
    dead = [3, 17, 39]
    moments[dead] = 0
    moments[:, dead] = 0
    weight[:, 17] *= 1000
    found = OBS.ladder(weight, moments, 1)
    assert set(found.order[-3:].tolist()) == set(dead)
    assert all(squared_error(weight - found.level(kept), moments) == 0 for kept in (39, 37))
    stayed = found.order[37:39].tolist()
    assert torch.allclose(found.level(39)[:, stayed], weight[:, stayed])
    nothing = OBS.ladder(weight, torch.zeros(40, 40), 1)
    stayed = nothing.order[:20].tolist()
    assert torch.allclose(nothing.level(20)[:, stayed], weight[:, stayed]) and not nothing.level(0).any()


def test_singular_moments_are_damped_until_they_can_be_factorised() -> None:
    weight, _ = layer(8, 40)
    x = torch.ones(40) * 3
    moments = torch.outer(x, x)
    total = float((weight @ x).square().sum())
    assert 0 < squared_error(weight - OBS.ladder(weight, moments, 1).level(1), moments) < 0.01 * total


def test_a_pool_keeps_the_largest_of_all_and_exactly_as_many_as_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (37, 64), "b": (11, 256), "c": (5, 8)}
    matrices = {
        name: torch.randn(shape, generator=generator) * scale for (name, shape), scale in zip(sizes.items(), (1, 0.3, 0.01), strict=True)
    }
    masks = [Mask("magnitude", share) for share in (90, 50, 30)]
    found = pooled(matrices.items(), masks)
    flat = torch.cat([matrix.flatten().abs() for matrix in matrices.values()])
    for mask in masks:
        counts, number = found[mask], round(mask.density * len(flat))
        assert sum(counts.values()) == number
        assert counts["c"] >= round(FLOOR * 40)
        for name in ("a", "b"):  # but for those that are alike to eight digits, and what the floor of the third takes
            own, threshold = matrices[name].abs(), flat.sort(descending=True).values[number - 1]
            assert int((own > threshold * 1.02).sum()) - 40 <= counts[name] <= int((own > threshold * 0.98).sum())


def test_of_weights_that_are_all_alike_each_matrix_keeps_its_share() -> None:
    matrices = {"a": torch.ones(3, 8), "b": -torch.ones(2, 8), "c": torch.full((4, 8), 0.5)}
    (counts,) = pooled(matrices.items(), [Mask("magnitude", 30)]).values()
    assert counts["c"] == round(FLOOR * 32) and sum(counts.values()) == round(0.3 * 72)
    assert abs(counts["a"] - 12) <= 1 >= abs(counts["b"] - 8)
    assert keep_of_group(torch.ones(1, 8), 1, 4).tolist() == [[True, False, False, False] * 2]
    assert (keep_uniform(torch.rand(37, 64, generator=torch.Generator().manual_seed(0)), 0.3).sum(1) == round(0.3 * 64)).all()


def test_patterns_keep_the_best_of_each_group() -> None:
    weight, moments = layer(6, 32)
    scores = weight_scores(weight, moments)
    assert torch.allclose(scores, weight.double().abs() * moments.diagonal().double().sqrt())
    mask = keep_of_group(scores, 1, 4)
    for row, group in itertools.product(range(6), range(8)):
        own = slice(4 * group, 4 * group + 4)
        assert mask[row, own].sum() == 1 and scores[row, own][mask[row, own]].item() == scores[row, own].max()
