"""Nested storage: one tensor of integers a layer, out of which an integer operation makes every smaller size."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from anyfit.core.space import Choice, Decision
from anyfit.core.units import Unit, Weight
from anyfit.elastic.base import Elastic
from anyfit.formats.fitting import HALF_MAX
from anyfit.quantizers import double_rounding


class NestedWeight(nn.Module):
    """A parametrization of a layer's weight: the layer computes with the integers of `bits` that rounding twice makes of it.

    One `scale` for the layer, as in the paper, or one for each `group` of columns, (rows, groups, 1). `transposed`: the weight is
    (columns, rows). What is trained of a scale is the logarithm of what it is multiplied by: scales are a thousandth of the weights, and
    a step that suits these would carry them anywhere.
    """

    first: Tensor

    def __init__(self, weight: Tensor, sizes: Sequence[int], group: int | None, transposed: bool) -> None:
        super().__init__()
        self.high, self.bits, self.group, self.transposed = max(sizes), max(sizes), group, transposed
        self.register_buffer("first", double_rounding.first_scale(self.grouped(weight.detach()), self.high, tuple(sizes)))
        self.factor = nn.Parameter(torch.zeros_like(self.first))

    @property
    def scale(self) -> Tensor:
        return self.first * self.factor.exp()

    def grouped(self, weight: Tensor) -> Tensor:
        """With what shares a scale in the last dimension."""
        rows = weight.T if self.transposed else weight
        return rows.flatten() if self.group is None else rows.unflatten(1, (-1, self.group))

    def forward(self, weight: Tensor) -> Tensor:
        rounded = double_rounding.rounded_twice(self.grouped(weight), self.scale, self.high, self.bits)
        return rounded.flatten(1).T if self.transposed else rounded.view(weight.shape)


@dataclass(frozen=True)
class NestedLayer:
    """A layer of a network, and the parametrization of its weight. Choices are named by their bits."""

    layer: nn.Module
    nested: NestedWeight

    def set(self, choice: str) -> None:
        self.nested.bits = int(choice)

    @property
    def matrix(self) -> Tensor:
        weight = cast(Tensor, self.layer.weight)
        return weight.T if self.nested.transposed else weight

    @property
    def original(self) -> nn.Parameter:
        """What the integers are made of while they are trained."""
        return self.layer.get_parameter("parametrizations.weight.original")


class SwitchedNorm(nn.Module):
    """A batch norm for each size, as what arrives differs in mean and variance; all begin as the given one."""

    def __init__(self, norm: nn.BatchNorm2d, sizes: Sequence[int]) -> None:
        super().__init__()
        self.of_size = nn.ModuleDict({str(bits): _copy(norm) for bits in sizes})
        self.bits = max(sizes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.of_size[str(self.bits)](inputs)


@dataclass(frozen=True)
class Stored:
    """One layer of a nested file: int8 `integers` of `high` bits, (rows, columns) or as the layer's weight, and their `scale`, see
    `NestedWeight`."""

    integers: Tensor
    scale: Tensor
    high: int
    transposed: bool = False

    @property
    def bytes_(self) -> int:
        return -(-self.integers.numel() * self.high // 8) + 4 * self.scale.numel()

    def values(self, bits: int) -> Tensor:
        grouped = self.integers.view(*self.scale.shape[:-1], -1)
        found = double_rounding.values(grouped, self.scale, self.high, bits).view(self.integers.shape)
        return found.T if self.transposed else found


class NestedNetwork(Elastic[nn.Module]):
    """`model`, which is changed, with the weights at `paths`, which units are named by, nested. `group`: see `NestedWeight`; `transposed`:
    those paths where the weight is."""

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        sizes: Sequence[int],
        group: int | None = None,
        transposed: Collection[str] = (),
    ) -> None:
        assert group is not None or not transposed
        self.model, self.sizes = model, tuple(sorted(sizes, reverse=True))
        self.layers: dict[str, NestedLayer] = {}
        self.decisions = tuple(self._decision(path) for path in paths)
        for path in paths:
            layer: Any = model.get_submodule(path)
            self.layers[path] = NestedLayer(layer, NestedWeight(layer.weight, sizes, group, path in transposed))
            parametrize.register_parametrization(layer, "weight", self.layers[path].nested)
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
        self._norms: dict[str, SwitchedNorm] = {}
        for name in norms:
            norm = model.get_submodule(name)
            assert isinstance(norm, nn.BatchNorm2d)
            self._norms[name] = SwitchedNorm(norm, sizes)
            model.set_submodule(name, self._norms[name])

    def _decision(self, path: str) -> Decision:
        """Of one weight, how many bits."""
        layer: Any = self.model.get_submodule(path)
        shape = layer.weight.shape
        weight = Weight(f"{path}.weight", (shape[0], shape[1:].numel()), path, path)
        sizes = {bits: -(-weight.num_weights * bits // 8) for bits in reversed(self.sizes)}
        return Decision(Unit(path, (weight,)), tuple(Choice(str(bits), size, size) for bits, size in sizes.items()))

    def buffers(self) -> dict[str, Tensor]:
        """What a pass in training changes."""
        return {f"{path}.{name}": value for path, norm in self._norms.items() for name, value in norm.named_buffers()}

    def set(self, config: Mapping[tuple[str, str], str]) -> nn.Module:
        """Norms are those of the size that most weights have."""
        super().set(config)
        own = [layer.nested.bits for layer in self.layers.values()]
        most = max(self.sizes, key=own.count)
        for norm in self._norms.values():
            norm.bits = most
        return self.model

    def extracted(self, plain: nn.Module, config: Mapping[tuple[str, str], str]) -> nn.Module:
        """`plain`, an ordinary network such as was given, with the values of this config: out of the stored integers."""
        self.set(config)
        stored, state = self.stored(), self.model.state_dict()
        for path, entry in stored.items():
            state[f"{path}.weight"] = entry.values(self.layers[path].nested.bits)
        for path, norm in self._norms.items():
            state |= {f"{path}.{name}": value for name, value in norm.of_size[str(norm.bits)].state_dict().items()}
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        return plain.train(self.model.training)

    def factors(self) -> dict[str, nn.Parameter]:
        """Logarithms of what the scales are multiplied by."""
        return {path: layer.nested.factor for path, layer in self.layers.items()}

    @torch.no_grad()
    def settle(self) -> None:
        """Run with the halves that scales are stored as from now on."""
        for weight in (layer.nested for layer in self.layers.values()):
            weight.first.copy_(weight.scale.clamp(-HALF_MAX, HALF_MAX).half())
            weight.factor.zero_()

    @torch.no_grad()
    def stored(self) -> dict[str, Stored]:
        """What a file holds of the weights, by path."""
        found = {}
        for path, layer in self.layers.items():
            weight, original = layer.nested, layer.original
            rounded = double_rounding.integers(weight.grouped(original), weight.scale, weight.high)
            shaped = rounded.flatten(1) if weight.transposed else rounded.view(original.shape)
            found[path] = Stored(shaped, weight.scale.clone(), weight.high, weight.transposed)
        return found


def _copy(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made.load_state_dict(norm.state_dict())
    return made
