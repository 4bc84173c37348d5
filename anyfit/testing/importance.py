"""Conformance of any importance: what the search for structure relies on."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.core.config import HEADS, WIDTH
from anyfit.importance.base import Importance, NetworkImportance, damped
from anyfit.interface import LANGUAGE, PICTURES, TEXTS, interface_of
from anyfit.modeling_cut import spread
from anyfit.progress import Silent
from anyfit.structure.cutting import rows_of
from anyfit.structure.space import structures
from anyfit.testing.models import tiny_model

_KINDS = {LANGUAGE: ("llama", "gpt2", "opt"), TEXTS: ("bert",), PICTURES: ("vit",)}


def check_importance(importance: Importance | NetworkImportance) -> None:
    """Raises AssertionError where the importance breaks its contract: one of matrices, for single columns and for wider structures; one of
    networks, for several kinds of those that it can be asked about."""
    if isinstance(importance, NetworkImportance):
        for kind in (kind for interface in importance.reads for kind in _KINDS[interface]):
            _check_scores(importance, kind)
        scores = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        order = importance.of(scores).order(torch.ones(2, 60), torch.eye(60), 1)
        assert torch.equal(order, scores.argsort(descending=True)) and importance.of(scores).repairs == importance.repairs
        return
    for size in (1, 3):
        _check(importance, size)


def _check_scores(importance: NetworkImportance, kind: str) -> None:
    """Of a network in which a group of heads and a channel do nothing."""
    model = tiny_model(kind, num_hidden_layers=2).requires_grad_(False)
    architecture = architecture_of(model)
    found = structures(model, architecture, list(architecture.weights(model)))
    segments = _segments(model)
    heads, width = (next(s for s in found.values() if s.axis == axis and s.reader.block == 0) for axis in (HEADS, WIDTH))
    for structure in (heads, width):
        _columns(model, structure.reader.name, structure.reader.transposed)[:, : structure.size] = 0
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    scores = importance.scores(model, architecture, found, segments, Silent())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the model isn't changed"
    assert torch.equal(torch.get_rng_state(), state), "nor is the global random state"
    assert scores.keys() == found.keys()
    for name, structure in found.items():
        assert scores[name].shape == (structure.num,) and scores[name].dtype == torch.float64, name
        assert scores[name].isfinite().all() and (scores[name] >= 0).all(), name
    for structure in (heads, width):
        own = scores[structure.reader.name]
        assert own[0] <= 1e-6 * own.max() and own.max() > 0, "what does nothing costs nothing"
    again = importance.scores(model, architecture, found, segments, Silent())
    assert all(torch.equal(again[name], own) for name, own in scores.items()), "the same in, the same out"
    moved = torch.arange(width.num).flip(0)
    rows = rows_of(model, architecture, width.reader, moved)
    for name, which in rows.items():
        parameter, turned = model.get_parameter(name), any(w.name == name and w.transposed for w in width.rest)
        parameter.data = parameter.data[:, which].contiguous() if turned else parameter.data[which].contiguous()
        bias = model.get_submodule(name.removesuffix(".weight")).bias
        if isinstance(bias, torch.Tensor):
            bias.data = bias.data[which].contiguous()
    columns = _columns(model, width.reader.name, width.reader.transposed)
    columns.copy_(columns[:, spread(moved, width.size)].clone())
    others = importance.scores(model, architecture, found, segments, Silent())
    for name, own in others.items():
        expected = scores[name][moved] if name == width.reader.name else scores[name]
        assert torch.allclose(own, expected, rtol=2e-2, atol=1e-4 * float(expected.max())), "no structure is preferred for its place"


def _segments(model: PreTrainedModel) -> torch.Tensor:
    """Three, at random."""
    generator, interface = torch.Generator().manual_seed(0), interface_of(model.config)
    if interface.words:
        return torch.randint(model.config.vocab_size, (3, 24), generator=generator)
    example = interface.example(model.config, 3, 1)
    return torch.randn(example.shape, generator=generator)


def _columns(model: PreTrainedModel, name: str, transposed: bool) -> torch.Tensor:
    """A matrix (outputs, inputs), which may be written to."""
    matrix = model.get_parameter(name).data
    return matrix.T if transposed else matrix


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
