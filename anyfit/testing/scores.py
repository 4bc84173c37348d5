"""Conformance of any sensitivity."""

from __future__ import annotations

import math

import torch

from anyfit.elastic.model import ElasticModel
from anyfit.progress import Silent
from anyfit.scores.base import Errors, Sensitivity
from anyfit.tasks.language import Reference


def check_sensitivity(sensitivity: Sensitivity, elastic: ElasticModel, reference: Reference, errors: Errors) -> None:
    """Raises AssertionError where the sensitivity breaks its contract on this network."""
    before = {name: parameter.detach().clone() for name, parameter in elastic.model.named_parameters()}
    state = torch.random.get_rng_state()
    found = sensitivity.measure(elastic, reference, errors, Silent())
    assert found.keys() == {decision.unit.name for decision in elastic.space.decisions}, "one number a unit"
    assert all(math.isfinite(value) and value >= 0 for value in found.values()), "finite, and no unit does good by being wrong"
    assert any(found.values()), "some unit matters"
    assert found == sensitivity.measure(elastic, reference, errors, Silent()), "the same in, the same out"
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state is not touched"
    for name, parameter in elastic.model.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} is left as it was"
        assert not parameter.requires_grad and parameter.grad is None, f"{name} is left without gradients"
