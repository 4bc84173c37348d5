"""Training one nested network at all its sizes, each with its own update and its own rate of the scales.

Paper: "Nearly Lossless Adaptive Bit Switching", arXiv 2502.01199, algorithm A.2 and the adaptive learning rate scaling (ALRS).
At few bits the gradient of the shared scale has a factor 2^D; so with D fewer bits than are stored the scales move at

    eta * rate * (1 - mean of min(largest |gradient|, 1) over the layers),   eta = 10^(-D/2), or 5 * 10^(-(D+1)/2) for odd D.

As printed the mean is subtracted from the rate itself, not from 1, which makes nearly every rate negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from anyfit.core.config import FORMAT, Config
from anyfit.elastic.nested import NestedNetwork
from anyfit.trainers.loop import Trainable
from anyfit.trainers.sampling import Draws

FLOOR = 0.05
"""Of the rate, that is left where gradients are large everywhere."""
ALL = "all layers"


def at(bits: int) -> Config:
    """One size everywhere."""
    return Config({(ALL, FORMAT): str(bits)})


class EverySize(Draws):
    """A sampler: each step draws every size once, from the largest on."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._configs = [at(bits) for bits in sorted(sizes, reverse=True)]

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        return self._configs


class BitSwitching(Trainable):
    """`objective`: the loss of the network at a step. `adaptive`: scales at their own rates. `rest`: train what isn't nested, too."""

    def __init__(self, network: NestedNetwork, objective: Callable[[int], Tensor], *, adaptive: bool = True, rest: bool = True) -> None:
        self.network, self._objective, self._adaptive = network, objective, adaptive
        scales = network.scales()
        known = {id(scale) for scale in scales.values()}
        weights = {name: value for name, value in network.model.named_parameters() if id(value) not in known}
        if not rest:
            for value in weights.values():
                value.requires_grad_(False)
            weights = {name: value for name, value in weights.items() if ".parametrizations." in name}
        self.buffers = dict(network.model.named_buffers())
        self.groups = {"weights": weights, "scales": {f"scale of {path}": scale for path, scale in scales.items()}}

    def loss(self, config: Config, step: int) -> Tensor:
        self.network.set(self._bits(config))
        return self._objective(step)

    def rates(self, config: Config, rate: float) -> Mapping[str, float]:
        if not self._adaptive:
            return super().rates(config, rate)
        gradients = [scale.grad for scale in self.network.scales().values() if scale.grad is not None]
        mean = float(np.mean([min(float(gradient.abs().max()), 1.0) for gradient in gradients]))
        return {"weights": rate, "scales": rate * ladder(max(self.network.sizes) - self._bits(config)) * max(1 - mean, FLOOR)}

    def described(self, config: Config) -> str:
        return f" at {self._bits(config)} bits"

    def _bits(self, config: Config) -> int:
        return int(config[ALL, FORMAT])


def ladder(missing: int) -> float:
    """The paper's eta, for so many bits fewer than are stored."""
    return 10 ** (-missing / 2) if missing % 2 == 0 else 5 * 10 ** (-(missing + 1) / 2)
