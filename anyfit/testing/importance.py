"""Conformance of any importance: what the search for structure relies on."""

from __future__ import annotations

import torch

from anyfit.importance.base import Importance, damped


def check_importance(importance: Importance) -> None:
    """Raises AssertionError where the importance breaks its contract, for single columns and for wider structures."""
    for size in (1, 3):
        _check(importance, size)


def _check(importance: Importance, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(300, 60, generator=generator) @ torch.randn(60, 60, generator=generator)).relu()
    weight, moments = torch.randn(10, 60, generator=generator), x.T @ x / len(x)
    kept_weight, kept_moments = weight.clone(), moments.clone()
    structures = 60 // size
    found = importance.ladder(weight, moments, size)
    assert torch.equal(weight, kept_weight) and torch.equal(moments, kept_moments), "arguments are not changed"
    assert found.order.dtype == torch.int64 and found.order.sort().values.tolist() == list(range(structures)), "each structure once"
    assert torch.equal(found.level(structures), weight), "all kept is the original"
    hessian, columns = damped(moments), torch.arange(60).unflatten(0, (-1, size))
    for number in (structures, structures // 2, 5, 0):
        left = found.level(number)
        stay, removed = columns[found.order[:number]].flatten(), columns[found.order[number:]].flatten()
        assert left.dtype == torch.float32 and left.shape == weight.shape and not left[:, removed].any(), "removed columns are zero"
        lost = (weight - left).double()
        if importance.repairs:  # no change of what is kept can make good more: what is lost is orthogonal to it
            assert ((lost @ hessian)[:, stay].abs() < 1e-4 * hessian.diagonal().max()).all(), "repaired by least squares"
        else:
            assert not lost[:, stay].any(), "what is kept stays as it is"
    again = importance.ladder(weight, moments, size)
    assert torch.equal(again.order, found.order) and torch.equal(again.level(5), found.level(5)), "the same in, the same out"
    permutation = torch.randperm(structures, generator=generator)
    moved = columns[permutation].flatten()
    order = importance.order(weight[:, moved].contiguous(), moments[moved][:, moved].contiguous(), size)
    assert torch.equal(permutation[order], found.order), "no structure is preferred for its place"
