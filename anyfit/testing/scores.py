"""Conformance of any sensitivity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anyfit.elastic.stream import ElasticStream
from anyfit.progress import Silent
from anyfit.scores.base import Errors, Sensitivity


def check_sensitivity(sensitivity: Sensitivity, elastic: ElasticStream, tokens: Tensor, errors: Errors) -> None:
    """Raises AssertionError where the sensitivity breaks its contract on this network."""
    state = torch.random.get_rng_state()
    found = sensitivity.measure(elastic, tokens, errors, Silent())
    assert found.keys() == {decision.unit.name for decision in elastic.space.decisions}, "one number a unit"
    assert all(math.isfinite(value) and value >= 0 for value in found.values()), "finite, and no unit does good by being wrong"
    assert any(found.values()), "some unit matters"
    assert found == sensitivity.measure(elastic, tokens, errors, Silent()), "the same in, the same out"
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state is not touched"
    modules = elastic.stream.model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules), "the network is left without hooks"
