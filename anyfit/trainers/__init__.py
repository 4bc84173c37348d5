"""Training all sizes of a network at once: the one loop, and samplers. One line a sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyfit.core.registry import Registry

if TYPE_CHECKING:
    from anyfit.trainers.sampling import Sampler

samplers: Registry[type[Sampler]] = Registry(
    "sampler",
    {
        "balanced": "anyfit.trainers.sampling:Balanced",
        "every-size": "anyfit.trainers.sampling:EverySize",
        "frontier": "anyfit.trainers.sampling:Frontier",
        "hessian-aware": "anyfit.trainers.sampling:HessianAware",
        "sandwich": "anyfit.trainers.sampling:Sandwich",
        "shifted": "anyfit.trainers.sampling:Shifted",
        "uniform": "anyfit.trainers.sampling:Uniform",
    },
)
