"""Cutting a network physically: smaller matrices, and nothing at all where nothing is kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import getsource
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from anyfit import modeling_cut
from anyfit.architectures import architectures
from anyfit.architectures.base import Architecture
from anyfit.architectures.coverage import passthrough
from anyfit.core.errors import ModelError
from anyfit.core.units import Weight
from anyfit.interface import interface_of
from anyfit.modeling_cut import (
    HEADS,
    Layout,
    Sizes,
    attention_rows,
    cut_attention,
    cut_feed_forward,
    describe,
    feed_forward_rows,
    overrides,
)

MODULE = "modeling_cut"
"""Name of the file that travels with a network whose blocks have different sizes."""


@dataclass(frozen=True)
class Kept:
    """Of one block: the `groups` of heads around one key and value head, and the `channels` of the feed-forward, as indices into
    the block as it is, int64 and rising. None: all; empty: that half of the block is removed."""

    groups: Tensor | None = None
    channels: Tensor | None = None


def sizes(model: PreTrainedModel, architecture: Architecture) -> list[Sizes]:
    """Of every block, cut or not. Raises `ModelError` where anyfit doesn't know where heads and channels are."""
    layout = _layout(architecture)
    return [modeling_cut.sizes(block, _paths(architecture, index), layout) for index, block in _blocks(model, architecture)]


def cut(model: PreTrainedModel, architecture: Architecture, kept: Sequence[Kept]) -> PreTrainedModel:
    """Remove everything but what is kept of each block, in place: rows, columns, biases and counts of heads. The model may be on meta.

    An attention or feed-forward of which nothing is kept becomes a module that gives the bias of its output projection, or zeros,
    and keeps its parameters' names. The config says the sizes that differ in `per_layer_config`. What remains computes what the
    network would with the removed columns of its output projections at zero.

    Raises `ModelError` where anyfit doesn't know where heads and channels are.
    """
    layout = _layout(architecture)
    before = sizes(model, architecture)
    assert len(kept) == len(before), f"{len(kept)} blocks where the network has {len(before)}"
    for (index, block), block_kept, own in zip(_blocks(model, architecture), kept, before, strict=True):
        paths = _paths(architecture, index)
        for which, number, remove in (
            (block_kept.groups, own.groups, cut_attention),
            (block_kept.channels, own.channels, cut_feed_forward),
        ):
            if which is not None:
                assert which.dtype == torch.int64 and all(-1 < i < number for i in which.tolist()), (index, which)
                assert (which.diff() > 0).all(), f"block {index}: not rising"
                remove(block, paths, layout, which)
    _tell(model, architecture, layout)
    return model


def whole_again(model: PreTrainedModel, whole: PreTrainedModel, architecture: Architecture, kept: Sequence[Kept]) -> dict[str, Tensor]:
    """Every tensor of a cut `model` in its place in the `whole` network, by its first name: zeros where parts were left out, so that it
    computes the same.

    `whole`: a skeleton, which is used up. `kept`: what the model was cut with, or cuts one after another came to.
    """
    shapes, found = {name: tensor.shape for name, tensor in passthrough(whole, ())[0].items()}, dict[str, Tensor]()
    places = _numbered(whole)
    cut(whole, architecture, kept)
    left = whole.state_dict()
    own = passthrough(model, ())[0]
    for name, shape in shapes.items():
        if name not in places:
            found[name] = own[name].clone()
            continue
        found[name] = torch.zeros(shape.numel())
        if name in own:
            found[name][left[name].flatten()] = own[name].float().flatten()
        found[name] = found[name].view(shape)
    return found


def rows_of(model: PreTrainedModel, architecture: Architecture, reader: Weight, kept: Tensor) -> dict[str, Tensor]:
    """The rows that are left of the whole `model`'s other matrices when these structures of what `reader` reads are kept, by parameter
    name."""
    layout, index = _layout(architecture), reader.block
    assert index is not None
    own, paths = sizes(model, architecture)[index], _paths(architecture, index)
    rows = attention_rows(own, layout, kept) if reader.role == "o" else feed_forward_rows(own.channels, kept)
    block = architecture.block.format(i=index)
    return {f"{block}.{paths[role]}.weight": rows[role] for role in rows.keys() & paths.keys()}


def plain_changes(model: PreTrainedModel, architecture: Architecture, config: PretrainedConfig) -> dict[str, Any] | None:
    """What to change in the whole network's `config` so that its own class builds one of the cut `model`'s sizes; None where it
    can't: blocks differ, or a size isn't the config's to say."""
    layout, (first, *others) = _layout(architecture), sizes(model, architecture)
    if any(other != first for other in others) or not first.groups or not first.channels:
        return None
    changes = overrides(first, config, layout)
    if HEADS in changes:
        changes["head_dim"] = first.head_dim
    changes = {config.attribute_map.get(name, name): value for name, value in changes.items()}
    try:
        changed = type(config).from_dict(config.to_dict() | changes)
        with torch.device("meta"):
            built = type(model)(changed)
    except Exception:  # what a config refuses, and with which error, is each class's own affair
        return None
    return changes if _shapes(built) == _shapes(model) else None


def described(model: PreTrainedModel, architecture: Architecture, config: PretrainedConfig) -> PretrainedConfig:
    """The config of a network of the whole sizes, changed to say the cut `model`'s: once for all blocks where its own class can build
    them, in `per_layer_config` otherwise."""
    changes = plain_changes(model, architecture, config)
    if changes is not None:
        return type(config).from_dict(config.to_dict() | changes)
    found = copy.deepcopy(config)
    describe(found, _overrides(model, architecture, config))
    return found


def uneven_changes(model: PreTrainedModel, architecture: Architecture) -> tuple[dict[str, Any], str]:
    """What to change in the config of the whole network so that the file `MODULE`.py builds one of the cut `model`'s sizes, block by
    block, and that file's text."""
    name, kind = type(model).__name__, type(model.config).__name__
    per_layer = {str(index): said for index, said in _overrides(model, architecture, model.config).items()}
    auto_map = {"AutoConfig": f"{MODULE}.Cut{kind}", interface_of(model.config).auto: f"{MODULE}.Cut{name}"}
    changes = {
        "model_type": f"cut_{architecture.name}",
        "architectures": [f"Cut{name}"],
        "auto_map": auto_map,
        "per_layer_config": per_layer,
    }
    text = _CLASSES.format(
        name=name,
        kind=kind,
        model_type=changes["model_type"],
        block=architecture.block,
        paths=_paths(architecture, 0),
        layout=_layout(architecture),
    )
    return changes, getsource(modeling_cut) + text


_CLASSES = """

from transformers import {kind}, {name}


class Cut{kind}(CutConfig, {kind}):
    model_type = "{model_type}"


class Cut{name}(CutModel, {name}):
    config_class = Cut{kind}
    block = "{block}"
    paths = {paths}
    layout = {layout}
"""


def _numbered(model: PreTrainedModel) -> set[str]:
    """Gives each parameter of a skeleton the numbers of its own places; their names."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in names:
        path, _, attribute = name.rpartition(".")
        shape = model.get_parameter(name).shape
        setattr(model.get_submodule(path), attribute, nn.Parameter(torch.arange(shape.numel()).view(shape), requires_grad=False))
    return names


def _tell(model: PreTrainedModel, architecture: Architecture, layout: Layout) -> None:
    """Make the config say the blocks' sizes."""
    per_layer = _overrides(model, architecture, model.config)
    if not per_layer:
        return
    describe(model.config, per_layer)
    if layout.reads_config:
        for (_, block), own in zip(_blocks(model, architecture), model.config.per_layer_config, strict=True):
            block.get_submodule(layout.attention).config = own


def _overrides(model: PreTrainedModel, architecture: Architecture, config: PretrainedConfig) -> dict[int, dict[str, Any]]:
    """What `per_layer_config` says, by block; `config` may already say it."""
    whole = copy.copy(config)
    whole.per_layer_config = None
    found = (overrides(own, whole, _layout(architecture)) for own in sizes(model, architecture))
    return {index: changes for index, changes in enumerate(found) if changes}


def _layout(architecture: Architecture) -> Layout:
    if architecture.layout is None:
        raise ModelError(
            f"Networks of the kind {architecture.name!r} can't be cut: anyfit doesn't know where heads and channels are in their matrices.",
            remedy=f"Use one of {', '.join(architectures)}, or add a layout to this kind's description.",
        )
    return architecture.layout


def _blocks(model: PreTrainedModel, architecture: Architecture) -> list[tuple[int, nn.Module]]:
    return [(index, model.get_submodule(architecture.block.format(i=index))) for index in range(architecture.num_blocks(model))]


def _paths(architecture: Architecture, index: int) -> dict[str, str]:
    return {role: path for _, paths in architecture.groups(index) for role, path in paths.items()}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
