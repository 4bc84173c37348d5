"""A matrix in a network that runs as any of its variants, each with something of its own to train.

Storage is *decoupled*: each choice has its own frozen codes. What is trained of a choice touches neither its codes nor
another choice:

- Where zero points needn't be whole (`int*_offset`), an `Adapter`: of LLM-QFA and QA-LoRA, low-rank behind a pool over each
  group of columns. It sees one number a group, so it is the same as other offsets, and merges into them exactly.
- Elsewhere the halves that the scales are proportional to, as factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.core.config import Config
from anyfit.core.space import Decision
from anyfit.core.units import Weight
from anyfit.distributed import ALONE, Group
from anyfit.formats.base import GridFormat, Scales
from anyfit.formats.fitting import HALF_MAX
from anyfit.formats.integer import IntegerFormat
from anyfit.tuning.coded import Stored, placed, taken


class Adapter(nn.Module):
    """y += pool(x) Aᵀ Bᵀ, with the sum of each group of inputs as pool(x): LLM-QFA §3, after QA-LoRA eq. 4.

    `down` A (rank, groups), `up` B (outputs, rank), zero at first; `scale` is the papers' s.
    """

    def __init__(self, outputs: int, groups: int, rank: int, scale: float, generator: Generator) -> None:
        super().__init__()
        start = torch.randn(rank, groups, generator=generator) / math.sqrt(groups)
        self.down, self.up = nn.Parameter(start), nn.Parameter(torch.zeros(outputs, rank))
        self.scale = scale

    @property
    def sums(self) -> Tensor:
        """What is added to all weights of a group, (outputs, groups): the offsets are less by this."""
        return self.scale * (self.up @ self.down)


class Variant(nn.Module):
    """One choice of one matrix: its codes, frozen, and what is trained of it. Rows are in the network's order."""

    levels: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, stored: Stored, rank: int, generator: Generator) -> None:
        super().__init__()
        assert isinstance(stored.format_, GridFormat)
        self.order, self.format_ = stored.order, stored.format_
        self.adapter: Adapter | None = None
        self.factors = nn.ParameterDict()
        codes, self.scales = self.format_.read(stored.data)
        self.codes = nn.Parameter(placed(codes, stored.order), requires_grad=False)
        self.register_buffer("levels", self.format_.levels)
        self.register_buffer("scale", placed(self.scales.scale, stored.order))
        self.register_buffer("offset", placed(self.scales.offset, stored.order))
        if trains_offsets(self.format_):
            outputs, groups = self.scale.shape
            # A step of all of B then moves an offset by about the rate, in steps of the grid.
            scale = float(self.scale.abs().mean()) * math.sqrt(groups / min(rank, groups))
            self.adapter = Adapter(outputs, groups, min(rank, groups), scale, generator)
            return
        for half in dict.fromkeys(half for half in (self.format_.scale_half, self.format_.offset_half) if half):
            self.factors[half] = nn.Parameter(torch.zeros(placed(self.scales.stored[half], self.order).shape))

    def trained(self) -> list[nn.Parameter]:
        return [*(self.adapter.parameters() if self.adapter else ()), *self.factors.parameters()]

    def forward(self) -> Tensor:
        """The matrix but for its adapter, (outputs, inputs) float32."""
        levels = self.codes.float() + self.levels[0] if self.format_.uniform else self.levels[self.codes.int()]
        scale = self._moved(self.scale, self.format_.scale_half)
        offset = self._moved(self.offset, self.format_.offset_half)
        return (levels.unflatten(1, (-1, self.format_.group)) * scale.unsqueeze(-1) - offset.unsqueeze(-1)).flatten(1)

    def _moved(self, grid: Tensor, half: str | None) -> Tensor:
        """Scales or offsets (outputs, groups) as the `half` that they are proportional to was trained."""
        if half is None or half not in self.factors:
            return grid
        factor = self.factors[half].exp()
        return grid * factor.repeat_interleave(grid.shape[1] // factor.shape[1], 1)

    @property
    def values(self) -> Tensor:
        """The matrix, (outputs, inputs) float32."""
        frozen: Tensor = self()
        if self.adapter is None:
            return frozen
        return frozen + self.adapter.sums.repeat_interleave(self.format_.group, 1)

    @torch.no_grad()
    def merged(self) -> Scales | None:
        """The scales with what was trained, rows in stored order; None where nothing is."""
        if self.adapter is None and not self.factors:
            return None
        if self.adapter is not None:
            assert isinstance(self.format_, IntegerFormat)
            zero = self.format_.zero_of(self.scales.scale, self.scales.offset - taken(self.adapter.sums.cpu(), self.order))
            return self.format_.assemble({**self.scales.stored, "zero": zero})
        halves = dict(self.scales.stored)
        for half, factor in self.factors.items():
            moved = halves[half].float() * taken(factor.exp().cpu(), self.order)
            halves[half] = moved.clamp(-HALF_MAX, HALF_MAX).to(halves[half].dtype)
        return self.format_.assemble(halves)

    def settle(self, scales: Scales) -> None:
        """Run with these scales, rows in stored order, from now on; nothing is left to train."""
        self.scales, self.adapter, self.factors = scales, None, nn.ParameterDict()
        self.scale, self.offset = (placed(part, self.order).to(self.codes.device) for part in (scales.scale, scales.offset))


def trains_offsets(format_: GridFormat) -> bool:
    """Whether adapters merge into this format's offsets."""
    return isinstance(format_, IntegerFormat) and format_.kind == "offset"


class ElasticLinear(nn.Module):
    """In place of a network's Linear (or Conv1D): runs as the variant that is `chosen`."""

    def __init__(self, variants: Mapping[str, Variant], bias: Tensor | None) -> None:
        super().__init__()
        self.variants = nn.ModuleDict(variants)
        self.bias = bias
        self.chosen = next(iter(variants))

    def forward(self, inputs: Tensor) -> Tensor:
        variant = self.variants[self.chosen]
        assert isinstance(variant, Variant)
        outputs = _multiplied(variant, inputs, self.bias)
        if variant.adapter is None:
            return outputs
        pooled = inputs.unflatten(-1, (-1, variant.format_.group)).sum(-1)
        return outputs + linear(linear(pooled, variant.adapter.down), variant.adapter.up) * variant.adapter.scale


def _multiplied(variant: Variant, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Inputs times the variant but for its adapter. Numbers that nothing is learnt of aren't kept for the way back but made again out of
    their codes: all matrices at once would be the network in float32."""
    weight = variant()
    if weight.requires_grad:
        return linear(inputs, weight, bias)
    place = weight.data_ptr()

    def packed(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        return (saved.shape, saved.stride()) if saved.data_ptr() == place else saved

    def unpacked(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        return kept if isinstance(kept, Tensor) else variant().as_strided(*kept)

    with saved_tensors_hooks(packed, unpacked):
        return linear(inputs, weight, bias)


class ElasticNetwork:
    """A network whose matrices in the blocks are `ElasticLinear`; `set` costs an assignment a matrix.

    `model` is changed. `matrices`: {unit: {choice: its matrix}} of what is trained, block by block; whatever else is decided about stays
    as it is. `decisions`: about these units, with these choices. The processes of a `group` hold the blocks' codes together: each block is
    shared out as soon as it is there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decisions: Sequence[Decision],
        matrices: Mapping[str, Mapping[str, Stored]],
        rank: int,
        seed: int,
        group: Group = ALONE,
    ) -> None:
        self.model, self.linears, self.sharded = model, dict[str, ElasticLinear](), not group.alone
        generator = Generator().manual_seed(seed)
        self.decisions = tuple(decisions)
        where, architecture = model.device, architecture_of(model)
        for block, units in groupby(matrices.items(), lambda entry: _weight(entry[1]).block):
            for unit, stored in units:
                path = _weight(stored).name.removesuffix(".weight")
                bias = getattr(model.get_submodule(path), "bias", None)
                self.linears[unit] = ElasticLinear({name: Variant(entry, rank, generator) for name, entry in stored.items()}, bias)
                model.set_submodule(path, self.linears[unit].to(where))
            if block is not None:
                group.shard(model.get_submodule(architecture.block.format(i=block)))

    def set(self, config: Mapping[tuple[str, str], str] | Config) -> PreTrainedModel:
        for decision in self.decisions:
            self.linears[decision.unit.name].chosen = config[decision.key]
        return self.model

    def variants(self) -> dict[tuple[str, str], Variant]:
        """By unit and choice."""
        return {(unit, name): v for unit, one in self.linears.items() for name, v in one.variants.items() if isinstance(v, Variant)}


def _weight(stored: Mapping[str, Stored]) -> Weight:
    """The matrix that these are the choices of."""
    return next(iter(stored.values())).weight
