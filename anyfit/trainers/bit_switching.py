"""Training one nested network at all its sizes, each with its own update and its own rate of the scales.

Paper: "Nearly Lossless Adaptive Bit Switching", arXiv 2502.01199, algorithm A.2 and the adaptive learning rate scaling (ALRS).
At few bits the gradient of the shared scale has a factor 2^D; so with D fewer bits than are stored the scales move at

    eta * rate * (1 - mean of min(largest |gradient|, 1) over the layers),   eta = 10^(-D/2), or 5 * 10^(-(D+1)/2) for odd D.

As printed the mean is subtracted from the rate itself, not from 1, which makes nearly every rate negative.
Differs from the paper in what these rates are of: not of the scales but of the logarithms of what they are multiplied by, where a step is
a share of the scale. What ALRS mends isn't there then: at two bits, where it is said to matter, a ResNet-20 is half a point worse with it
(docs/benchmarks/train-once.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from anyfit.core.config import FORMAT, Config
from anyfit.elastic.nested import NestedNetwork
from anyfit.trainers.loop import Trainable
from anyfit.trainers.losses import Objective

FLOOR = 0.05
"""Of the rate, that is left where gradients are large everywhere."""


class BitSwitching(Trainable):
    """Configs are of the network's own decisions. `scale_rate`: of the scales, times that of the weights. `adaptive`: at few bits less, see
    above. `shares`: what the losses of configs of so many mean bits, rounded, are multiplied by. `rest`: train what isn't nested, too."""

    def __init__(
        self,
        network: NestedNetwork,
        objective: Objective,
        *,
        scale_rate: float = 1.0,
        adaptive: bool = True,
        shares: Mapping[int, float] = MappingProxyType({}),
        rest: bool = True,
    ) -> None:
        self.network, self.objective = network, objective
        self._scale_rate, self._adaptive, self._shares = scale_rate, adaptive, shares
        factors = network.factors()
        known = {id(factor) for factor in factors.values()}
        weights = {name: value for name, value in network.model.named_parameters() if id(value) not in known}
        if not rest:
            for value in weights.values():
                value.requires_grad_(False)
            weights = {name: value for name, value in weights.items() if ".parametrizations." in name}
        self._numbers = {d.unit.name: d.unit.num_weights for d in network.decisions}
        self.buffers = network.buffers()
        self.groups = {"weights": weights, "scales": {f"scale of {path}": factor for path, factor in factors.items()}}

    def set(self, config: Config) -> None:
        self.network.set(config)

    def bits(self, config: Config) -> float:
        return sum(int(config[path, FORMAT]) * number for path, number in self._numbers.items()) / sum(self._numbers.values())

    def share(self, config: Config) -> float:
        return self._shares.get(round(self.bits(config)), 1.0)

    def rates(self, config: Config, rate: float) -> Mapping[str, float]:
        return {"weights": rate, "scales": rate * self._scale_rate * (self._slower(config) if self._adaptive else 1.0)}

    def _slower(self, config: Config) -> float:
        gradients = [factor.grad for factor in self.groups["scales"].values() if factor.grad is not None]
        mean = float(np.mean([min(float(gradient.abs().max()), 1.0) for gradient in gradients]))
        return ladder(max(self.network.sizes) - round(self.bits(config))) * max(1 - mean, FLOOR)


def ladder(missing: int) -> float:
    """The paper's eta, for so many bits fewer than are stored."""
    return 10 ** (-missing / 2) if missing % 2 == 0 else 5 * 10 ** (-(missing + 1) / 2)
