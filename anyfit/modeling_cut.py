"""Networks of which some blocks have fewer heads and narrower feed-forwards than others, or none at all.

This file needs torch and transformers only: a copy of it lies beside the weights of such a model, with two classes of its
kind added at the end, and is what `from_pretrained(folder, trust_remote_code=True)` of transformers' own class for them runs. The whole
network is built first, by its own class and without memory for its numbers, then its blocks are cut to the sizes that
config.json says in `per_layer_config`, a field of transformers' own. There `skip` names the halves of a block that aren't there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

ATTENTION, FEED_FORWARD = "attention", "mlp"
"""The words in `skip`."""
HEADS, GROUPS = "num_attention_heads", "num_key_value_heads"


@dataclass(frozen=True)
class Layout:
    """Where KV groups and feed-forward channels are in the matrices of a block. A KV group is a head of k and v with all heads of q
    that read it; in a network without shared keys, a head.

    `attention`, `feed_forward`: paths below the block of the modules that are those halves; the latter is None where no module holds
    the feed-forward's matrices and nothing else. The output projection of an attention may stand outside it.
    `by_group`: the rows of a fused q, k, v are all of the first group, then all of the second, and so on, rather than all of q, then of
    k, then of v. `head_dim`: what the attention calls the width of a head. `counts`: attributes of the attention that hold a size, and
    which: "groups", "heads" or "width", the columns of the output projection. `reads_config`: its forward asks its config for the number
    of heads. `channels`: what the config calls the number of channels. `norms`: by the word for a half, the norm of what that half alone
    reads, and `norms_after` of what it gives; `norms_first`: the block's attribute that says whether `norms` are what they are, for kinds
    in which they may also stand elsewhere.
    """

    attention: str
    feed_forward: str | None
    by_group: bool = False
    head_dim: str = "head_dim"
    counts: Mapping[str, str] = field(default_factory=dict)
    reads_config: bool = False
    channels: str = "intermediate_size"
    norms: Mapping[str, str] = field(default_factory=dict)
    norms_after: Mapping[str, str] = field(default_factory=dict)
    norms_first: str | None = None


@dataclass(frozen=True)
class Sizes:
    """Of one block. Where the attention is left out, `groups` is 0 and so are `heads`, of one group, and `head_dim`."""

    groups: int
    heads: int
    head_dim: int
    channels: int


class Constant(nn.Module):
    """What a projection of no columns gives: its bias (hidden,), or a zero (), to be added to every token's state."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(()) if self.bias is None else self.bias


class NoAttention(nn.Module):
    """In the place of an attention without heads. `output`: the name of its output projection, whose bias remains.

    The cache is asked for the number of tokens by block, so one zero a token is put there.
    """

    def __init__(self, output: str, bias: nn.Parameter | None, layer_idx: int) -> None:
        super().__init__()
        self.output, self.layer_idx = output, layer_idx
        self.add_module(output, Constant(bias))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if cache is not None:
            token = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(token, token, self.layer_idx)
        return self.get_submodule(self.output)(hidden_states), None


class NoHeads(nn.Module):
    """In the place of an attention without heads whose output projection stands outside it: that is a `Constant` then."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None


class NoFeedForward(nn.Module):
    """In the place of a feed-forward without channels. `output`: the name of its output projection, whose bias remains."""

    def __init__(self, output: str, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.output = output
        self.add_module(output, Constant(bias))

    def forward(self, hidden_states: Tensor) -> Tensor:
        value: Tensor = self.get_submodule(self.output)(hidden_states)
        return value


def sizes(block: nn.Module, paths: Mapping[str, str], layout: Layout) -> Sizes:
    """Of a block as it is, cut or not. `paths`: the block's matrices, {role: path below the block}."""
    attention = block.get_submodule(layout.attention)
    narrow = block.get_submodule(paths["down"])
    channels = 0 if isinstance(narrow, Constant) else shape(narrow)[1]
    if isinstance(attention, (NoAttention, NoHeads)):
        return Sizes(0, 0, 0, channels)
    head_dim: int = getattr(attention, layout.head_dim)
    width = shape(block.get_submodule(paths["o"]))[1]
    rows = sum(shape(block.get_submodule(paths[role]))[0] for role in ("q", "k", "v", "qkv") if role in paths)
    groups = (rows - width) // 2 // head_dim
    return Sizes(groups, width // head_dim // groups, head_dim, channels)


def is_removed(block: nn.Module, path: str) -> bool:
    """Whether the module at this path below the block was removed with its half."""
    module = block
    for name in path.split("."):
        if isinstance(module, (NoAttention, NoHeads, NoFeedForward)):
            return True
        module = getattr(module, name, module)
    return isinstance(module, (Constant, nn.Identity))


def attention_rows(whole: Sizes, layout: Layout, groups: Tensor) -> dict[str, Tensor]:
    """By role, the rows of an attention's matrices that belong to these KV groups; those of q are the output projection's columns."""
    wide, narrow = whole.heads * whole.head_dim, whole.head_dim
    q, k = spread(groups, wide), spread(groups, narrow)
    first_k, first_v = whole.groups * wide, whole.groups * (wide + narrow)
    fused = spread(groups, wide + 2 * narrow) if layout.by_group else torch.cat([q, first_k + k, first_v + k])
    return {"q": q, "k": k, "v": k, "qkv": fused}


def feed_forward_rows(whole: int, channels: Tensor) -> dict[str, Tensor]:
    """By role, the rows of a feed-forward's matrices that belong to these of the `whole` number of channels."""
    return {"gate": channels, "up": channels, "gate_up": torch.cat([channels, whole + channels])}


def cut_attention(block: nn.Module, paths: Mapping[str, str], layout: Layout, groups: Tensor) -> None:
    """Keep these KV groups, int64 and rising, in place."""
    whole = sizes(block, paths, layout)
    attention: Any = block.get_submodule(layout.attention)
    if len(groups) == whole.groups:
        return
    if not len(groups) and not paths["o"].startswith(f"{layout.attention}."):
        replace(block, layout.attention, NoHeads())
        replace(block, paths["o"], Constant(bias(block, paths["o"])))
        return
    if not len(groups):
        left = bias(block, paths["o"])
        replace(block, layout.attention, NoAttention(paths["o"].rpartition(".")[2], left, getattr(attention, "layer_idx", 0)))
        remove_norms(block, layout, ATTENTION, left)
        return
    rows = attention_rows(whole, layout, groups)
    for role in rows.keys() & paths.keys():
        select(block.get_submodule(paths[role]), rows[role], 0)
    select(block.get_submodule(paths["o"]), rows["q"], 1)
    counted = {"groups": len(groups), "heads": len(groups) * whole.heads, "width": len(rows["q"])}
    for attribute, count in layout.counts.items():
        assert hasattr(attention, attribute), attribute
        setattr(attention, attribute, counted[count])


def cut_feed_forward(block: nn.Module, paths: Mapping[str, str], layout: Layout, channels: Tensor) -> None:
    """Keep these channels, int64 and rising, in place."""
    whole = sizes(block, paths, layout).channels
    if len(channels) == whole:
        return
    if len(channels):
        rows = feed_forward_rows(whole, channels)
        for role in rows.keys() & paths.keys():
            select(block.get_submodule(paths[role]), rows[role], 0)
        select(block.get_submodule(paths["down"]), channels, 1)
        return
    left = bias(block, paths["down"])
    remove_norms(block, layout, FEED_FORWARD, left)
    if layout.feed_forward is not None:
        replace(block, layout.feed_forward, NoFeedForward(paths["down"].rpartition(".")[2], left))
        return
    replace(block, paths["down"], Constant(left))
    for role in ("gate", "up", "gate_up"):
        if role in paths:
            replace(block, paths[role], nn.Identity())


def remove_norms(block: nn.Module, layout: Layout, half: str, left: nn.Parameter | None) -> None:
    """Those that belong to a half that was removed, of which `left` remains. The norm of a zero is a zero, of a bias it isn't the bias."""
    if layout.norms_first is not None and not getattr(block, layout.norms_first):
        return
    paths = [layout.norms.get(half), layout.norms_after.get(half) if left is None else None]
    for path in filter(None, paths):
        replace(block, path, nn.Identity())


def stated(config: Any, layout: Layout) -> Sizes:
    """What a config says of a block: a network's that isn't cut, or one of its `per_layer_config`."""
    skip = getattr(config, "skip", ())
    heads: int = getattr(config, HEADS)
    groups = getattr(config, GROUPS, None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    channels = getattr(config, layout.channels) or 4 * config.hidden_size  # GPT-2's need not say
    channels = 0 if FEED_FORWARD in skip else channels
    return Sizes(0, 0, 0, channels) if ATTENTION in skip else Sizes(groups, heads // groups, head_dim, channels)


def overrides(cut: Sizes, config: Any, layout: Layout) -> dict[str, Any]:
    """What `per_layer_config` says of a block of these sizes; nothing where they are those of the network's `config`.

    An attention that isn't there has one head one number wide: what it keeps in the cache.
    """
    whole = stated(config, layout)
    skip = [half for half, size in ((ATTENTION, cut.groups), (FEED_FORWARD, cut.channels)) if not size]
    changes: dict[str, Any] = {"skip": skip} if skip else {}
    if cut.groups != whole.groups:
        changes[HEADS] = cut.groups * cut.heads or 1
        if hasattr(config, GROUPS):
            changes[GROUPS] = cut.groups or 1
    if not cut.groups:
        changes["head_dim"] = 1
    if cut.channels not in (0, whole.channels):
        changes[layout.channels] = cut.channels
    return changes


def describe(config: Any, per_layer: Mapping[int, Mapping[str, Any]]) -> None:
    """Put the sizes of blocks into a network's config, in place of any before."""
    config.per_layer_config = None
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // getattr(config, HEADS)
    config.allow_global_per_layer_attribute_access = True  # for what is built before the blocks are cut
    config.per_layer_config = {index: dict(changes) for index, changes in per_layer.items()}


def bias(block: nn.Module, path: str) -> nn.Parameter | None:
    """Of a matrix of a block."""
    module: Any = block.get_submodule(path)
    found: nn.Parameter | None = module.bias
    return found


def shape(module: Any) -> tuple[int, int]:
    """(outputs, inputs)"""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def select(module: Any, index: Tensor, dim: int) -> None:
    """Keep some outputs (`dim` 0) or inputs (1) of a matrix, in place."""
    stored = 1 - dim if isinstance(module, Conv1D) else dim
    module.weight = chosen(module.weight, stored, index)
    if dim == 0 and module.bias is not None:
        module.bias = chosen(module.bias, 0, index)
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    else:
        module.out_features, module.in_features = module.weight.shape


def chosen(parameter: nn.Parameter, dim: int, index: Tensor) -> nn.Parameter:
    """A parameter that holds these parts of another's numbers."""
    return nn.Parameter(parameter.detach().index_select(dim, index.to(parameter.device)), parameter.requires_grad)


def spread(index: Tensor, width: int) -> Tensor:
    """Indices of groups to those of their rows, `width` each."""
    return (index[:, None] * width + torch.arange(width)).flatten()


def replace(block: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in another's place, with its mode."""
    module.train(block.get_submodule(path).training)
    block.set_submodule(path, module)


class CutConfig:
    """Before a kind's own config class among the bases of a cut network's."""

    def __post_init__(self, per_layer_config: Mapping[str, Mapping[str, Any]] | None = None, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if per_layer_config is not None:
            describe(self, {int(index): changes for index, changes in per_layer_config.items()})

    def validate_architecture(self) -> None:
        """Nothing: the kind's own rule is about networks of which nothing was cut."""


class CutModel:
    """Before a kind's own class among the bases of a cut network's. `block`: path of block `{i}`."""

    block: str
    paths: Mapping[str, str]
    layout: Layout

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # each size of the whole network that is read here would be warned of
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            logging.set_verbosity(level)
        for index, own in enumerate(config.per_layer_config):
            block = self.get_submodule(self.block.format(i=index))  # type: ignore[attr-defined]
            there = stated(own, self.layout)
            cut_attention(block, self.paths, self.layout, torch.arange(there.groups))
            cut_feed_forward(block, self.paths, self.layout, torch.arange(there.channels))
            if self.layout.reads_config and there.groups:
                block.get_submodule(self.layout.attention).config = own
