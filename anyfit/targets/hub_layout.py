"""How a Hugging Face folder keeps the decided matrices: as plain tensors, or in the layout of one package of quantised modules.

config.json names one such package, which then replaces modules when the folder is loaded. So a folder mixes the formats of one layout with
plain tensors, and layouts don't mix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.core.units import Weight
from anyfit.formats import formats
from anyfit.formats.base import CastFormat
from anyfit.targets.base import Needs
from anyfit.targets.safetensors_file import Slot

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Place(ABC):
    """One matrix in the file. `problem`: why it can only be a plain tensor; empty where it can be more."""

    weight: Weight
    problem: str

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that share the matrix, the one that it is stored for first."""
        return [name.removesuffix(".weight") for name in (self.weight.name, *self.weight.tied)]

    def refuses(self, name: str) -> str | None:
        """Why this matrix can't be stored in a format; None where it can."""
        if isinstance(formats.get(name), CastFormat):
            return None
        return self.problem or self._refuses(name)

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The tensors that the matrix takes in a format."""
        if name not in DTYPES:
            return self._slots(name)
        shape = self.weight.shape[::-1] if self.weight.transposed else self.weight.shape
        return (Slot(self.weight.name, DTYPES[name], shape),)

    def tensors(self, name: str, data: Tensor) -> dict[str, Tensor]:
        """The variant's bytes, uint8 (data_rows, row_bytes), as those tensors."""
        if name not in DTYPES:
            return self._tensors(name, data)
        values = data.clone().view(DTYPES[name])
        return {self.weight.name: values.T if self.weight.transposed else values}

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrix that a reader makes of those tensors, float32, in the checkpoint's orientation."""
        return tensors[self.weight.name].float() if name in DTYPES else self._decode(name, tensors)

    def substitute(self, name: str) -> str | None:
        """What comes nearest to a format that is refused; None where that is a plain tensor."""
        return None

    @abstractmethod
    def _refuses(self, name: str) -> str | None: ...

    @abstractmethod
    def _slots(self, name: str) -> tuple[Slot, ...]: ...

    @abstractmethod
    def _tensors(self, name: str, data: Tensor) -> dict[str, Tensor]: ...

    @abstractmethod
    def _decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor: ...


class Layout(ABC):
    """What a package reads. Stateless. `formats`: those that one folder can have beside each other and plain tensors, dearest first.
    `needs`: what whoever loads such a folder must have and know."""

    formats: tuple[str, ...]
    needs: Needs

    @abstractmethod
    def place(self, model: PreTrainedModel, weight: Weight) -> Place:
        """How a folder can keep a matrix of this network, which may be on meta."""

    @abstractmethod
    def quantization_config(self, model: PreTrainedModel, chosen: Iterable[tuple[Place, str]]) -> dict[str, Any] | None:
        """What config.json says of (matrix, format) pairs; None where all are plain tensors."""

    @abstractmethod
    def lacks_runtime(self) -> str | None:
        """What to install before a folder in this layout can be loaded; None where it is there."""

    def environment(self) -> dict[str, str]:
        """What a process that loads such a folder needs in its environment."""
        return {}


def modules_of(model: PreTrainedModel, weight: Weight) -> list[nn.Module]:
    """Those that share the matrix, in the order of `Place.modules`."""
    return [model.get_submodule(name.rpartition(".")[0]) for name in (weight.name, *weight.tied)]


def below(module: str, slot: Slot) -> Slot:
    """The slot of a module's tensor."""
    return Slot(f"{module}.{slot.name}", slot.dtype, slot.shape)
