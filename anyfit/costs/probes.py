"""Networks to be timed: with smaller blocks, which keep all of their modules, one kind, or none."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from anyfit import network
from anyfit.architectures import architecture_of
from anyfit.core.errors import UserError
from anyfit.costs.latency import ATTENTION, FEED_FORWARD, KINDS, Shape
from anyfit.interface import interface_of
from anyfit.structure.cutting import Kept, cut, sizes

VOCABULARY = 256
"""Tokens of a network that is timed for its modules: as few as make embedding and head cost nothing."""


def shape_of(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Shape:
    """The shape of a network that isn't cut. Raises `UserError` where they differ, or where anyfit doesn't know how to cut them."""
    model = network.skeleton(config, trust_remote_code=trust_remote_code)
    first, *others = sizes(model, architecture_of(model))
    if any(other != first for other in others):
        raise UserError(f"The blocks of this {config.model_type} have different sizes.", remedy="Measure the network that it was cut from.")
    out = interface_of(config).width(config)
    return Shape(config.model_type, config.hidden_size, first.head_dim, first.heads, first.groups, first.channels, 1 + len(others), out)


def sized(config: PretrainedConfig, blocks: Sequence[tuple[int, int]], *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A network whose blocks are cut to (groups, width) each, its parameters on the meta device."""
    model = network.frame(config, trust_remote_code=trust_remote_code)
    with network.quiet():
        return cut(model, architecture_of(model), [Kept(torch.arange(groups), torch.arange(width)) for groups, width in blocks])


def probe(config: PretrainedConfig, shape: Shape, kept: Collection[str] = KINDS, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A network whose blocks are all cut to this shape; of its modules only the `kept` kinds are there.

    Where a kind is left out, so is most of the vocabulary: only differences of such networks mean anything.
    """
    changed = copy.deepcopy(config)
    if set(kept) != set(KINDS):
        fewer: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
        for name, value in fewer.items():
            setattr(changed, name, value)
    own = (shape.groups if ATTENTION in kept else 0, shape.width if FEED_FORWARD in kept else 0)
    return sized(changed, [own] * shape.blocks, trust_remote_code=trust_remote_code)
