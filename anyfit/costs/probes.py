"""Networks to be timed: of which blocks are smaller, or parts are left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from anyfit import network
from anyfit.architectures import architecture_of
from anyfit.core.errors import UserError
from anyfit.costs.latency import Shape
from anyfit.interface import interface_of
from anyfit.structure.cutting import Kept, cut, sizes


def shape_of(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Shape:
    """The shape of a network that isn't cut. Raises `UserError` where they differ, or where anyfit doesn't know how to cut them."""
    model = network.skeleton(config, trust_remote_code=trust_remote_code)
    first, *others = sizes(model, architecture_of(model))
    if any(other != first for other in others):
        raise UserError(f"The blocks of this {config.model_type} have different sizes.", remedy="Measure the network that it was cut from.")
    out = interface_of(config).width(config)
    return Shape(config.model_type, config.hidden_size, first.head_dim, first.heads, first.groups, first.channels, 1 + len(others), out)


def sized(config: PretrainedConfig, blocks: Sequence[tuple[int, int]], *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A network whose blocks are cut to (groups, width) each, its parameters on the meta device. 0: without that part."""
    model = network.frame(config, trust_remote_code=trust_remote_code)
    with network.quiet():
        return cut(model, architecture_of(model), [Kept(torch.arange(groups), torch.arange(width)) for groups, width in blocks])
