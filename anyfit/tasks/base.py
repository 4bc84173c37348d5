"""The contract of a task: what is remembered of an original's outputs, and how far others are from them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from anyfit.interface import interface_of

Outputs = Callable[[Tensor], Tensor]
"""Segments to what a network makes of them, as its `interface.Interface` says."""
KEPT_BYTES = 1 << 28
"""What is remembered of an original's outputs takes at most so much; beyond it the original runs again for each measurement."""


class Figure(NamedTuple):
    """One figure of a model, ready to be read: what it is, the original's, the model's."""

    name: str
    original: str
    value: str


@dataclass(frozen=True)
class Quality(ABC):
    """Figures of a model on held-out segments, beside its original's. `num_tokens`: what they are means over, or of."""

    num_tokens: int
    num_segments: int

    task: ClassVar[str]
    distance: ClassVar[str]
    """What the model's distance from the original is called."""
    about: ClassVar[str]
    """The same at length, with its unit."""

    @property
    @abstractmethod
    def loss(self) -> float:
        """The distance from the original, by which configs are chosen; none is exactly zero."""

    @property
    @abstractmethod
    def loss_stderr(self) -> float:
        """Its standard error over segments, NaN for a single one."""

    @property
    @abstractmethod
    def own(self) -> tuple[str, str] | None:
        """Name and value of what a model has without an original to compare it with, where there is such a figure."""

    @abstractmethod
    def columns(self) -> dict[str, str]:
        """The figures that tables have room for, the distance first."""

    @abstractmethod
    def figures(self, original: Quality) -> list[Figure]:
        """All of them."""

    def to_json(self) -> dict[str, Any]:
        """NaN, which JSON hasn't, becomes null."""
        return {"task": self.task} | {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        values: dict[str, Any] = {f.name: math.nan if data[f.name] is None else data[f.name] for f in fields(cls)}
        return cls(**values)


@dataclass(frozen=True)
class Divergences(Quality):
    """Figures of what predicts: KL(original || model) in nats, over predictions, and `top1`, how often the likeliest `answer` is the
    original's. Standard errors are over segments, and NaN for a single one."""

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p99: float
    top1: float
    top1_stderr: float

    distance = "KL to the original"
    per: ClassVar[str]
    """Of what each prediction is one."""
    answer: ClassVar[str]
    """What is predicted."""

    @property
    def loss(self) -> float:
        return self.kl_mean

    @property
    def loss_stderr(self) -> float:
        return self.kl_stderr

    @property
    def own(self) -> tuple[str, str] | None:
        return None

    def columns(self) -> dict[str, str]:
        own = {} if self.own is None else {self.own[0]: self.own[1]}
        return {self.distance: plus_minus(self.kl_mean, self.kl_stderr), **own, "top-1": plus_minus_percent(self.top1, self.top1_stderr)}

    def figures(self, original: Quality) -> list[Figure]:
        return [
            Figure(f"{self.distance}, mean (nats per {self.per})", "0", plus_minus(self.kl_mean, self.kl_stderr)),
            Figure("KL, median", "0", f"{self.kl_median:.3g}"),
            Figure("KL, 99th percentile", "0", f"{self.kl_p99:.3g}"),
            Figure(f"same likeliest {self.answer} as the original", "100 %", plus_minus_percent(self.top1, self.top1_stderr)),
        ]


class Reference(ABC):
    """What the original makes of some segments. `quality`: its own figures, at no distance from itself."""

    quality: Quality

    @abstractmethod
    def measured(self, outputs: PreTrainedModel | Outputs) -> Quality:
        """Every figure of a model. The original has a distance of exactly zero. Raises `ModelError` for outputs that aren't finite."""

    @abstractmethod
    def loss(self, outputs: PreTrainedModel | Outputs) -> float:
        """`measured(...).loss` without the rest."""


class Task(ABC):
    """Stateless."""

    quality: type[Quality]

    @abstractmethod
    def reference(self, outputs: PreTrainedModel | Outputs, segments: Tensor, *, kept_bytes: int = KEPT_BYTES) -> Reference:
        """Run the original over segments, once where it can be remembered in so many bytes."""

    @abstractmethod
    def memory(self, num_tokens: int, config: PretrainedConfig) -> int:
        """Bytes that a reference over this much text takes at most."""

    @abstractmethod
    def num_answers(self, segments: Tensor) -> int:
        """Of how many answers, each at a distance from the original's, a loss over these segments is the mean."""

    @abstractmethod
    def pull(self, run: Outputs, hidden: Tensor, segment: Tensor, seed: int) -> Tensor:
        """A drawn gradient g by what the last block makes of one segment, (1, length, width), with E[g gᵀ] the curvature of the sum of
        the segment's losses around the original. `run`: what comes after the blocks."""


def outputs_of(model: PreTrainedModel | Outputs) -> Outputs:
    """What a network makes of segments, wherever it computes them."""
    if not isinstance(model, nn.Module):
        return model
    assert not model.training, "a model in training mode answers at random"
    network: PreTrainedModel = model
    interface = interface_of(network.config)
    return lambda segments: interface(network, segments.to(network.device))


_ARITHMETIC = 1e-5
"""A standard error, as a share of its figure, that sums in float32 have anyway."""


def plus_minus(value: float, error: float) -> str:
    """A figure with its standard error, to the digits that mean something: `0.0123 ± 0.0004`. Alone where the error is that of arithmetic,
    as of segments that are all the same."""
    if not (math.isfinite(error) and error > _ARITHMETIC * abs(value)):
        return f"{value:.4g}"
    decimals = max(0, -math.floor(math.log10(error)) + (1 if error / 10 ** math.floor(math.log10(error)) < 3 else 0))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def plus_minus_percent(value: float, error: float) -> str:
    """A share with its standard error, in percent: `98.1 ± 0.2 %`."""
    return f"{100 * value:.1f} ± {100 * error:.1f} %" if math.isfinite(error) else f"{100 * value:.1f} %"
