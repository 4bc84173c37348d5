"""The family's numbers on disk: one safetensors file a matrix, one tensor a variant.

A variant is kept as the very bytes that the target's file will hold, rows in the target's order, so that
export is a copy. Files are opened lazily; each is compared with its hash before its first use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.errors import FamilyError
from anyfit.core.files import sha256, written_aside
from anyfit.core.space import Space
from anyfit.core.units import Weight
from anyfit.elastic.model import Decoded
from anyfit.formats import formats
from anyfit.quantizers.base import Encoded
from anyfit.targets.base import Target, Variants
from anyfit.tuning.coded import Stored

VARIANTS, SOURCE, PASSTHROUGH, TEXT = "variants", "source", "passthrough.safetensors", "text.safetensors"
REFINED = "refined"


class Store:
    """Reads and writes below one folder. `hashes` ({relative path: sha256}) are checked where given."""

    def __init__(self, folder: Path, hashes: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._hashes = hashes
        self._checked: set[str] = set()

    def has(self, weight: str) -> bool:
        return self._variants(weight).is_file()

    def write(self, weight: str, variants: Mapping[str, Encoded]) -> None:
        """All variants of one matrix; their errors and notes travel in the file's metadata."""
        notes = {name: {"error": v.error, "notes": list(v.notes)} for name, v in variants.items()}
        with written_aside(self._variants(weight)) as aside:
            save_file(
                {name: v.data.contiguous() for name, v in variants.items()}, aside, metadata={"variants": json.dumps(notes, sort_keys=True)}
            )

    def errors(self, weight: str) -> dict[str, float]:
        """{format: expected squared output error} of one matrix."""
        return {name: float(row["error"]) for name, row in self._metadata(weight).items()}

    def notes(self, weight: str) -> list[str]:
        """What was out of the ordinary when this matrix was encoded, each remark once."""
        return list(dict.fromkeys(note for row in self._metadata(weight).values() for note in row["notes"]))

    def variant(self, weight: str, format_: str) -> Tensor:
        """The bytes of one variant, uint8 (rows, row_bytes), memory-mapped."""
        path = self._variants(weight)
        with self._open(path) as file:
            return file.get_tensor(format_)

    def refined(self, config: Config) -> Variants:
        """Like `variant`, with the config's own matrices where it has them."""
        path = self.folder / refined_file(config)
        with self._open(path) as file:
            own = frozenset(file.keys())

        def variant(weight: str, format_: str) -> Tensor:
            if weight not in own:
                return self.variant(weight, format_)
            with self._open(path) as file:
                return file.get_tensor(weight)

        return variant

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Every tensor of one of the family's other files."""
        with self._open(self.folder / name) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open isn't iterable)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        with written_aside(self.folder / name) as aside:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside)

    def _variants(self, weight: str) -> Path:
        return self.folder / VARIANTS / f"{weight}.safetensors"

    def _metadata(self, weight: str) -> dict[str, dict[str, Any]]:
        with self._open(self._variants(weight)) as file:
            return json.loads(file.metadata()["variants"])

    def _open(self, path: Path) -> safe_open:
        self.verify(path.relative_to(self.folder).as_posix())
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise FamilyError(f"{path} can't be read: {error}.", remedy="Fit the family again.") from error

    def verify(self, name: str) -> None:
        """Raises `FamilyError` where the file is missing or isn't what the manifest says; looked at once."""
        if self._hashes is None or name in self._checked:
            return
        path = self.folder / name
        if not path.is_file():
            raise FamilyError(f"{path} is missing.", remedy="Restore it, or fit the family again.")
        if sha256(path) != self._hashes.get(name):
            raise FamilyError(
                f"{path} was altered: it doesn't match its hash in family.json.", remedy="Restore it, or fit the family again."
            )
        self._checked.add(name)


def refined_file(config: Config) -> str:
    """Where a family keeps the matrices that were solved again for one config."""
    return f"{REFINED}/{config.digest}.safetensors"


def stored_matrices(variants: Variants, space: Space, config: Config, target: Target, source: Source) -> list[Stored]:
    """Every decided matrix as it is stored under a config."""
    return [
        Stored(weight, formats.get(config[d.key]), variants(weight.name, config[d.key]), target.row_order(source, weight))
        for d in space.decisions
        for weight in d.unit.weights
    ]


def decoder(variants: Variants, target: Target, source: Source) -> Decoded:
    """A function from (weight, format name) to decoded values as the checkpoint holds them, float32."""

    def decoded(weight: Weight, format_: str) -> Tensor:
        values = formats.get(format_).decode(variants(weight.name, format_))
        order = target.row_order(source, weight)
        if order is not None:
            original = torch.empty_like(values)
            original[order] = values
            values = original
        return values.T.contiguous() if weight.transposed else values

    return decoded
