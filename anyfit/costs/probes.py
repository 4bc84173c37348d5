"""Networks to be timed: one of the same kind with other sizes, whose blocks keep all of their modules, one kind, or none."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from anyfit import network
from anyfit.architectures import architecture_of
from anyfit.core.errors import UserError
from anyfit.costs.latency import ATTENTION, FEED_FORWARD, KINDS, Shape
from anyfit.structure.cutting import Kept, cut

VOCABULARY = 256
"""Tokens of a network that is timed for its modules: as few as make embedding and head cost nothing."""
_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers")


def shape_of(config: PretrainedConfig) -> Shape:
    """The sizes of a network's blocks. Raises `UserError` for a kind that isn't told its sizes one by one."""
    found = {name: getattr(config, name, None) for name in _SIZES}
    missing = [name for name, value in found.items() if not isinstance(value, int)]
    if missing:
        raise UserError(
            f"Networks of the kind {config.model_type} have no {missing[0]} in their config, so no module can be timed by itself.",
            remedy="This version measures kinds like Llama, Mistral, Qwen and Gemma.",
        )
    hidden, heads, groups, width, blocks = (int(value) for value in found.values() if value is not None)
    return Shape(hidden, getattr(config, "head_dim", None) or hidden // heads, heads // groups, groups, width, blocks)


def probe(config: PretrainedConfig, shape: Shape, kept: Collection[str] = KINDS, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A network with blocks of this shape, its parameters on the meta device; of its modules only the `kept` kinds compute.

    Where a kind is left out, so is most of the vocabulary: only differences of such networks mean anything. Raises
    `UserError` where the kind's class doesn't do as its config says.
    """
    changed = copy.deepcopy(config)
    sizes: dict[str, Any] = {
        "num_attention_heads": shape.groups * shape.queries,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.blocks,
    }
    if getattr(config, "layer_types", None):
        sizes["layer_types"] = config.layer_types[: shape.blocks]
    if set(kept) != set(KINDS):
        sizes |= {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    for name, value in sizes.items():
        setattr(changed, name, value)
    model = network.frame(changed, trust_remote_code=trust_remote_code)
    architecture = architecture_of(model)
    inputs = {weight.role: weight.shape[1] for weight in architecture.weights(model) if weight.block is not None}
    if (inputs.get("o"), inputs.get("down")) != (shape.groups * shape.queries * shape.head_dim, shape.width):
        raise UserError(
            f"The modules of {type(model).__name__} can't be given other sizes by its config.",
            remedy="This version measures kinds like Llama, Mistral, Qwen and Gemma.",
        )
    if set(kept) != set(KINDS):
        none = torch.arange(0)
        left = Kept(None if ATTENTION in kept else none, None if FEED_FORWARD in kept else none)
        with network.quiet():
            cut(model, architecture, [left] * shape.blocks)
    return model
