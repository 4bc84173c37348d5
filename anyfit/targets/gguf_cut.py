"""Networks with parts left out, as llama.cpp runs them.

Where all blocks have the same sizes, a file is like any other of its kind. Otherwise its architecture is `deci`, which llama.cpp has for
Nemotron-NAS: a llama whose blocks say their own sizes. How it must be told of parts that aren't there was read in its loader and its
graph (`src/models/deci.cpp`), and tried:

- A block of nothing isn't in the file.
- An attention that isn't there has no heads and no norm, except in the first block, whose sizes stand for the network's: one of zeros,
  with a norm.
- A feed-forward that isn't there is one of `CHANNELS` channels of zeros, with a norm. With none, the attention's output would be lost as
  well, unnoticed, and in the last block the process would be aborted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from gguf import MODEL_ARCH
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.architectures.base import Architecture
from anyfit.architectures.coverage import passthrough
from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.units import Weight
from anyfit.formats import formats
from anyfit.modeling_cut import ATTENTION, FEED_FORWARD
from anyfit.modeling_cut import replace as put
from anyfit.structure.cutting import Kept, cut, described, sizes
from anyfit.targets import gguf_kinds, gguf_layout
from anyfit.targets.base import ALL, Cut

CHANNELS = 32
"""As many as a block of the smaller types has columns."""
_ZEROS = "Q4_0"


def refuses(config: PretrainedConfig) -> str | None:
    """Why llama.cpp can't run such a network with blocks of different sizes; None where it can."""
    kind = gguf_kinds.KINDS.get(config.model_type)
    if kind is None or kind.arch is not MODEL_ARCH.LLAMA:
        return f"llama.cpp has blocks of different sizes only for networks like Llama, and this is a {config.model_type}"
    if getattr(config, "attention_bias", False):
        return "its attention has biases, which llama.cpp has no place for where the attention itself is left out"
    if getattr(config, "mlp_bias", False):
        return "its feed-forwards have biases, which llama.cpp has no place for where the feed-forward itself is left out"
    return gguf_kinds.refuses(config, kind)


def zeros(shape: tuple[int, int]) -> str:
    """The format of a matrix of zeros, whose bytes are zeros in it, too."""
    return gguf_layout.legal(_ZEROS, shape)


@dataclass(frozen=True)
class Spelled:
    """A cut network as it is written. `model` computes what that does, and has no parts but such as llama.cpp knows. `blocks`: which
    each of its blocks was; `made`: names of its matrices of zeros, which the cut network hasn't."""

    model: PreTrainedModel
    blocks: tuple[int, ...]
    made: frozenset[str]

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """Its matrices by name."""
        return {weight.name: weight for weight in architecture_of(self.model).weights(self.model)}

    def source(self, source: Source) -> Source:
        """What a file's header and norms are made of. `source`: the whole network's."""
        fixed, tied = passthrough(self.model, self.weights.values())
        return replace(source, config=self.model.config, passthrough=fixed, tied=tied)

    def formats(self, chosen: Mapping[str, str], dense: str) -> Config:
        """The format of each matrix, given those that the cut network's have, by its names there."""
        return Config.of_formats(
            {
                name: zeros(weight.shape) if name in self.made else chosen.get(self.before(name), dense)
                for name, weight in self.weights.items()
            }
        )

    def before(self, name: str) -> str:
        """What the cut network calls one of its parameters."""
        block = self.weights[name].block
        if block is None:
            return name
        pattern = architecture_of(self.model).block
        return pattern.format(i=self.blocks[block]) + name.removeprefix(pattern.format(i=block))

    def variants(self, cut_: Cut, source: Source, name: str, format_: str, which: Tensor | slice = ALL) -> Tensor:
        """Bytes of a matrix, uint8 (rows, row_bytes), in the file's order. `source`: that of the file."""
        own = self.before(name)
        grid = formats.get(format_)
        if name in self.made:
            rows, columns = self.weights[name].shape
            return torch.zeros(rows, grid.row_bytes(columns), dtype=torch.uint8)[which]
        if own in cut_.formats:
            return cut_.variants(own, format_, which)
        values = gguf_layout.in_order(source, name, self.model.get_parameter(name).detach())
        return _cast(values, format_)[which]


def _cast(values: Tensor, format_: str) -> Tensor:
    """Numbers as the bytes of one of the types that are just numbers."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[format_]
    return values.to(dtype).contiguous().view(torch.uint8)


def spelled(model: PreTrainedModel, whole: PreTrainedModel) -> Spelled:
    """A cut network with its parts as llama.cpp wants them. It shares its parameters with `model`, which stays as it is.

    `whole`: the uncut network, which gives frames for what is made of zeros; its parameters may be on the meta device.
    """
    architecture = architecture_of(model)
    layout, before = architecture.layout, sizes(model, architecture)
    assert layout is not None and layout.feed_forward is not None
    kept = [index for index, own in enumerate(before) if own.groups or own.channels] or [len(before) - 1]
    channels = min(CHANNELS, max(own.channels for own in sizes(whole, architecture)))
    spare = cut(whole, architecture, [Kept(torch.arange(1), torch.arange(channels))] * len(before))
    made = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    path, names = architecture.block.removesuffix(".{i}"), set[str]()
    made.set_submodule(path, nn.ModuleList([made.get_submodule(f"{path}.{index}") for index in kept]))
    for place, index in enumerate(kept):
        block, own = made.get_submodule(f"{path}.{place}"), before[index]
        missing = [(ATTENTION, layout.attention)] if not own.groups and not place else []
        missing += [(FEED_FORWARD, layout.feed_forward)] if not own.channels else []
        for half, module in missing:
            for part in (module, layout.norms[half]):
                put(block, part, _zero(spare.get_submodule(f"{path}.{index}.{part}")))
            names |= {f"{path}.{place}.{module}.{name}" for name, _ in block.get_submodule(module).named_parameters()}
    made.config = _config(made, architecture, kept)
    return Spelled(made, tuple(kept), frozenset(names))


def _config(made: PreTrainedModel, architecture: Architecture, kept: Sequence[int]) -> PretrainedConfig:
    """Of so many blocks and of their sizes."""
    config = copy.deepcopy(made.config)
    config.per_layer_config = None
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    return described(made, architecture, config)


def _zero(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.zeros(parameter.shape), requires_grad=False))
    return module
