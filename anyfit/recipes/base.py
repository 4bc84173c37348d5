"""The contract of a recipe: a published method as a short composition of parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, TypeVar

from anyfit.core.effort import Effort

if TYPE_CHECKING:
    from anyfit.trainers import pv
    from anyfit.trainers.loop import Settings

_STEPS = {Effort.LOW: 1 / 3, Effort.NORMAL: 1.0, Effort.HIGH: 3.0}
"""Times the usual number of training steps."""


Steps = TypeVar("Steps", "Settings", "pv.Settings")


@dataclass(frozen=True)
class _Stage(Generic[Steps]):
    settings: Steps

    def settings_for(self, effort: Effort) -> Steps:
        return replace(self.settings, num_steps=round(_STEPS[effort] * self.settings.num_steps))


@dataclass(frozen=True)
class Training(_Stage["Settings"]):
    """How a recipe trains all variants at once. `sampler`: its name. `relative`: losses are divided by what their configs are expected to
    lose, see `trainers.decoupled.Decoupled`."""

    sampler: str
    relative: bool = False


@dataclass(frozen=True)
class Tuning(_Stage["pv.Settings"]):
    """How a recipe tunes the codes and scales of each format by itself."""


@dataclass(frozen=True)
class Nesting(_Stage["Settings"]):
    """How a recipe trains one stored matrix of integers for all formats. `sampler`: its name. `scale_rate` and `shares`: see
    `trainers.bit_switching.BitSwitching`."""

    sampler: str = "every-size"
    scale_rate: float = 1.0
    shares: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recovery(_Stage["Settings"]):
    """How a recipe trains networks from which parts were left out. `states`: the share in the loss of how far tokens' states are from the
    original's, see `trainers.losses.TokenDistance`; the rest is the divergence of what is predicted. `encoders`: what the rate is
    multiplied by for those that learn from states alone."""

    states: float = 0.0
    encoders: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Names of the parts that `fit` puts together, and what a person should know before choosing it."""

    name: str
    title: str
    paper: str
    about: str
    """What it does and when to choose it, in one paragraph."""
    score: str
    quantizer: str
    """What makes variants in formats."""
    pruning: str | None = None
    """The importance by which heads and channels are taken out."""
    masks: tuple[str, ...] = ()
    """The saliencies by which single weights are zeroed."""
    training: Training | Tuning | Nesting | None = None
    recovery: Recovery | None = None
    """How what was pruned is trained, where a person asks for that."""
    formats: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """By target, what it is meant for, offered unless others are named: the first menu of which no matrix in the blocks refuses a format,
    or the last."""
    needs: tuple[str, ...] = ()
    """Formats, without any of which it has nothing to do."""
