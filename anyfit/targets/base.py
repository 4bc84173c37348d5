"""The contract of a target: a runtime on a device, with its rules, its writer and its checker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.effort import Effort
from anyfit.core.errors import UnknownNameError, UserError
from anyfit.core.space import Space
from anyfit.core.units import Weight
from anyfit.costs.stopwatch import Stopwatch
from anyfit.elastic.extracted import Extracted
from anyfit.structure.space import Storage

ALL = slice(None)


class Variants(Protocol):
    """Where variants are found."""

    def __call__(self, weight: str, format_: str, which: Tensor | slice = ALL, /) -> Tensor:
        """The variant's bytes: uint8 (data_rows, row_bytes), of all its rows or some, in the target's order."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A network with parts left out: `model`, in memory and cut. `formats`: of its matrices that aren't dense, by parameter name, and
    `variants`: their bytes, uint8 (rows that are left, row_bytes)."""

    model: PreTrainedModel
    formats: Mapping[str, str]
    variants: Variants


@dataclass(frozen=True)
class Check:
    """One thing that was looked at after writing."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Needs:
    """What whoever loads a written model must have and know, in Markdown, and a module that they import first; empty where nothing."""

    text: str = ""
    plugin: str = ""


class Target(ABC):
    """Stateless; everything about the network comes from the family's `Source`, never from the original."""

    name: str
    suffix: str
    """What an exported path ends in (`.gguf`); empty where it is a folder."""
    formats: tuple[str, ...]
    """Every format that the runtime loads, dearest first."""
    default_formats: tuple[str, ...]
    """Those that `fit` makes unless told otherwise."""
    slow_formats: tuple[str, ...] = ()
    """Those that it makes besides, where the effort allows: they are worth it, but take long to encode."""

    def menu(self, effort: Effort) -> tuple[str, ...]:
        """The formats that `fit` makes unless told otherwise."""
        return (*self.default_formats, *(self.slow_formats if effort.slow_formats else ()))

    def named(self, formats: Iterable[str]) -> list[str]:
        """Each of these once. Raises `UnknownNameError` for one that the runtime doesn't load."""
        found = list(dict.fromkeys(formats))
        for name in found:
            if name not in self.formats:
                raise UnknownNameError(f"format of {self.name}", name, self.formats)
        return found

    @abstractmethod
    def supports(self, source: Source) -> str | None:
        """Why the runtime can't run this network at all; None where it can."""

    @abstractmethod
    def space(self, source: Source, weights: Iterable[Weight], formats: Iterable[str]) -> Space:
        """What may be decided: for each unit the formats that the runtime loads there, with exact bytes.

        Every unit keeps at least one choice: where no wanted format fits its row length, the nearest legal
        ones take their place and `Decision.refused` says why.
        """

    def needs(self, config: Config) -> Needs:
        """What it takes to load a written model, besides what its card says anyway."""
        return Needs()

    def row_order(self, source: Source, weight: Weight) -> Tensor | None:
        """Rows of the runtime's matrix as indices into the checkpoint's (outputs,); None where equal."""
        return None

    def places(self, source: Source, weight: Weight, rows: Tensor) -> Tensor:
        """Which rows of the runtime's matrix these of the checkpoint's are: indices, int64 and rising."""
        order = self.row_order(source, weight)
        return rows if order is None else torch.isin(order, rows).nonzero().flatten()

    @abstractmethod
    def write(self, path: Path, source: Source, space: Space, config: Config, variants: Variants) -> int:
        """Write the model to `path`, which doesn't exist yet (the caller renames it when it is whole).

        Returns the bytes that a budget counts, equal to `space.bytes_(config)`.
        """

    @abstractmethod
    def check(self, path: Path, source: Source, config: Config, model: Extracted, tokens: Tensor) -> tuple[Check, ...]:
        """Audit the written file, load it in every reader at hand, and compare with the extracted `model`.

        `tokens`: (segments, length) int64, text to compare outputs on. Each tensor once, each bit-equal to the
        model's weights; a runtime that isn't installed is a passed check whose detail says that it was skipped.
        """

    def stopwatch(self) -> Stopwatch | None:
        """What times networks in this runtime; None where this version has nothing that does."""
        return None


class CutTarget(Target):
    """A target that also takes networks with parts left out: attentions of fewer heads, narrower feed-forwards, or none."""

    @classmethod
    def of(cls, target: Target) -> CutTarget:
        """The target, if it is one. Raises `UserError` where it isn't."""
        if not isinstance(target, cls):
            raise UserError(
                f"{target.name} takes no networks with parts left out.", remedy="Take --target transformers, onnxruntime or llama.cpp."
            )
        return target

    @abstractmethod
    def dense(self, source: Source) -> str:
        """The format of everything that isn't quantised."""

    @abstractmethod
    def storage(self, source: Source, formats: Sequence[str]) -> Storage:
        """How such a network is stored. Raises `UserError` where it can't have these formats besides the dense one."""

    @abstractmethod
    def write_cut(self, path: Path, source: Source, cut: Cut) -> int:
        """Write such a network to `path`, which doesn't exist yet; returns the bytes that a budget counts, at most `Space.bytes_` of its
        config. `source`: the whole network's."""

    @abstractmethod
    def check_cut(self, path: Path, source: Source, cut: Cut, tokens: Tensor) -> tuple[Check, ...]:
        """As `check`, of what `write_cut` wrote."""
