"""A matrix in a network that runs as any of its variants, each with something of its own to train.

Storage is *decoupled*: each choice has its own frozen codes. What is trained of a choice touches neither its codes nor
another choice:

- Where zero points needn't be whole (`int*_offset`), an `Adapter`: of LLM-QFA and QA-LoRA, low-rank behind a pool over each
  group of columns. It sees one number a group, so it is the same as other offsets, and merges into them exactly.
- Elsewhere the halves that the scales are proportional to, as factors.
- Of additive codebooks their entries, and the scales of rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.core.space import Decision
from anyfit.core.units import Weight
from anyfit.distributed import ALONE, Group
from anyfit.elastic.base import Elastic
from anyfit.formats.aqlm import AdditiveFormat, summed
from anyfit.formats.base import GridFormat
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


class Variant(nn.Module, ABC):
    """One choice of one matrix: its codes, frozen, and what is trained of it. Rows are in the network's order."""

    codes: nn.Parameter
    group: int
    """Columns that the adapter sees one sum of."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.order = stored.order
        self.adapter: Adapter | None = None

    @abstractmethod
    def trained(self) -> list[nn.Parameter]: ...

    @abstractmethod
    def forward(self) -> Tensor:
        """The matrix but for its adapter, (outputs, inputs) float32."""

    @abstractmethod
    def merged(self) -> dict[str, Tensor]:
        """What was trained, as parts of what is stored, rows in stored order: see `tuning.coded.repacked`."""

    @abstractmethod
    def settle(self, parts: Mapping[str, Tensor]) -> None:
        """Run with these parts from now on, see `merged`; nothing is left to train."""

    @property
    def values(self) -> Tensor:
        """The matrix, (outputs, inputs) float32."""
        frozen: Tensor = self()
        return frozen if self.adapter is None else frozen + self.adapter.sums.repeat_interleave(self.group, 1)

    def _frozen(self, codes: Tensor) -> nn.Parameter:
        """A parameter, so that processes can hold codes together."""
        return nn.Parameter(placed(codes, self.order), requires_grad=False)


class GridVariant(Variant):
    """Codes on a grid."""

    levels: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, stored: Stored, rank: int, generator: Generator) -> None:
        super().__init__(stored)
        assert isinstance(stored.format_, GridFormat)
        self.format_, self.group = stored.format_, stored.format_.group
        self.factors = nn.ParameterDict()
        codes, self.scales = self.format_.read(stored.data)
        self.codes = self._frozen(codes)
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
        levels = self.codes.float() + self.levels[0] if self.format_.uniform else self.levels[self.codes.int()]
        scale = self._moved(self.scale, self.format_.scale_half)
        offset = self._moved(self.offset, self.format_.offset_half)
        return (levels.unflatten(1, (-1, self.group)) * scale.unsqueeze(-1) - offset.unsqueeze(-1)).flatten(1)

    def _moved(self, grid: Tensor, half: str | None) -> Tensor:
        """Scales or offsets (outputs, groups) as the `half` that they are proportional to was trained."""
        if half is None or half not in self.factors:
            return grid
        factor = self.factors[half].exp()
        return grid * factor.repeat_interleave(grid.shape[1] // factor.shape[1], 1)

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        if self.adapter is not None:
            assert isinstance(self.format_, IntegerFormat)
            offset = self.scales.offset - taken(self.adapter.sums.cpu(), self.order)
            return {"zero": self.format_.zero_of(self.scales.scale, offset)}
        stored = self.scales.stored
        return {name: _half(stored[name].float() * taken(by.exp().cpu(), self.order), stored[name]) for name, by in self.factors.items()}

    def settle(self, parts: Mapping[str, Tensor]) -> None:
        self.scales = self.format_.assemble({**self.scales.stored, **parts})
        self.adapter, self.factors = None, nn.ParameterDict()
        self.scale, self.offset = (placed(part, self.order).to(self.codes.device) for part in (self.scales.scale, self.scales.offset))


class AdditiveVariant(Variant):
    """Codes of additive codebooks. What is trained: how far their entries have moved, as a share of their root mean square, and the
    scales of rows, as logarithms of factors."""

    codebooks: Tensor
    scale: Tensor

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        assert isinstance(stored.format_, AdditiveFormat)
        parts = stored.format_.read(stored.data)
        self.group = stored.format_.group
        self.codes = self._frozen(parts.codes)
        self.register_buffer("codebooks", parts.codebooks.float())
        self.register_buffer("scale", placed(parts.scales, stored.order).float())
        self._unit = float(self.codebooks.square().mean().sqrt())
        self.steps: nn.Parameter | None = nn.Parameter(torch.zeros_like(self.codebooks))
        self.factor: nn.Parameter | None = nn.Parameter(torch.zeros_like(self.scale))

    def trained(self) -> list[nn.Parameter]:
        return [value for value in (self.steps, self.factor) if value is not None]

    def forward(self) -> Tensor:
        codebooks, scale = self._parts()
        return summed(codebooks, self.codes) * scale.unsqueeze(1)

    def _parts(self) -> tuple[Tensor, Tensor]:
        codebooks = self.codebooks if self.steps is None else self.codebooks + self._unit * self.steps
        return codebooks, self.scale if self.factor is None else self.scale * self.factor.exp()

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        if self.steps is None:
            return {}
        codebooks, scale = (part.clamp(-HALF_MAX, HALF_MAX).half().cpu() for part in self._parts())
        return {"codebooks": codebooks, "scales": taken(scale, self.order)}

    def settle(self, parts: Mapping[str, Tensor]) -> None:
        where = self.codes.device
        self.codebooks, self.scale = parts["codebooks"].float().to(where), placed(parts["scales"], self.order).float().to(where)
        self.steps = self.factor = None


def variant_of(stored: Stored, rank: int, generator: Generator) -> Variant:
    """`rank` of an adapter, and the `generator` that it starts from, where the format's variants have one."""
    return AdditiveVariant(stored) if isinstance(stored.format_, AdditiveFormat) else GridVariant(stored, rank, generator)


def _half(value: Tensor, like: Tensor) -> Tensor:
    return value.clamp(-HALF_MAX, HALF_MAX).to(like.dtype)


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

    def set(self, choice: str) -> None:
        self.chosen = choice

    @property
    def matrix(self) -> Tensor:
        return self._variant.values

    @property
    def _variant(self) -> Variant:
        variant = self.variants[self.chosen]
        assert isinstance(variant, Variant)
        return variant

    def forward(self, inputs: Tensor) -> Tensor:
        variant = self._variant
        outputs = _multiplied(variant, inputs, self.bias)
        if variant.adapter is None:
            return outputs
        pooled = inputs.unflatten(-1, (-1, variant.group)).sum(-1)
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


class ElasticNetwork(Elastic[PreTrainedModel]):
    """A network whose matrices in the blocks are `ElasticLinear`.

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
        self.model, self.sharded = model, not group.alone
        self.layers: dict[str, ElasticLinear] = {}
        generator = Generator().manual_seed(seed)
        self.decisions = tuple(decisions)
        where, architecture = model.device, architecture_of(model)
        for block, units in groupby(matrices.items(), lambda entry: _weight(entry[1]).block):
            for unit, stored in units:
                path = _weight(stored).name.removesuffix(".weight")
                bias = getattr(model.get_submodule(path), "bias", None)
                self.layers[unit] = ElasticLinear({name: variant_of(entry, rank, generator) for name, entry in stored.items()}, bias)
                model.set_submodule(path, self.layers[unit].to(where))
            if block is not None:
                group.shard(model.get_submodule(architecture.block.format(i=block)))

    def variants(self) -> dict[tuple[str, str], Variant]:
        """By unit and choice."""
        return {(unit, name): v for unit, one in self.layers.items() for name, v in one.variants.items() if isinstance(v, Variant)}


def _weight(stored: Mapping[str, Stored]) -> Weight:
    """The matrix that these are the choices of."""
    return next(iter(stored.values())).weight
