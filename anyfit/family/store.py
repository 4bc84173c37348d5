"""The family's numbers on disk: one safetensors file a matrix, one tensor a variant.

A variant is kept as the very bytes that the target's file will hold, rows in the target's order, so that
export is a copy. Files are opened lazily; each is compared with its hash before its first use.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyfit.activations import Among, Rounding
from anyfit.checkpoint import Source
from anyfit.core.config import Config, format_of
from anyfit.core.errors import FamilyError
from anyfit.core.files import sha256, written_aside
from anyfit.core.space import Space
from anyfit.core.units import Weight
from anyfit.formats import formats
from anyfit.formats.base import CastFormat
from anyfit.formats.nested import lowered
from anyfit.quantizers.base import Encoded
from anyfit.structure.levels import READERS, filled, kept_of
from anyfit.structure.masks import mask_of, unpack
from anyfit.targets.base import ALL, Target, Variants
from anyfit.tuning.coded import Stored

VARIANTS, SOURCE, PASSTHROUGH, TEXT = "variants", "source", "passthrough.safetensors", "text.safetensors"
REFINED = "refined"
ORDER = "order"
"""In the file of a matrix that reads structures, beside its variants: `Store.order`."""
_NOTES_BYTES, _VARIANT_BYTES = 1 << 14, 1 << 9
"""Of a file of variants, kept for its header: for all notes, and for what else it says of each variant."""


class Store:
    """Reads and writes below one folder. `hashes` ({relative path: sha256}) are checked where given."""

    def __init__(self, folder: Path, hashes: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._hashes = hashes
        self._checked: set[str] = set()

    def has(self, weight: str) -> bool:
        return self._variants(weight).is_file()

    @contextmanager
    def writing(self, weight: str, shapes: Mapping[str, tuple[int, int]]) -> Iterator[Writing]:
        """Write the variants of one matrix, {format: (data_rows, row_bytes)}, in any pieces; it is there when the block ends."""
        with written_aside(self._variants(weight)) as aside, aside.open("wb") as file:
            writing = Writing(file, shapes)
            yield writing
            writing.close()

    def rewrite(self, weight: str, changed: Mapping[str, Tensor]) -> None:
        """Replace the bytes of some variants of one matrix, {format: uint8 (data_rows, row_bytes)}; errors and notes stay."""
        derived = {name: row["of"] for name, row in self._metadata(weight).items() if "of" in row and name not in changed}
        self._replace(weight, changed, derived)

    def nest(self, weight: str, high: str, data: Tensor, lows: Iterable[str]) -> None:
        """Keep one format's bytes, of which those of `lows` are made whenever they are asked for; what else there is stays."""
        derived = {name: row["of"] for name, row in self._metadata(weight).items() if "of" in row}
        self._replace(weight, {high: data}, derived | dict.fromkeys(lows, high))

    def _replace(self, weight: str, changed: Mapping[str, Tensor], derived: Mapping[str, str]) -> None:
        about = {name: {key: value for key, value in row.items() if key != "of"} for name, row in self._metadata(weight).items()}
        stored = {name: changed[name] if name in changed else self.variant(weight, name) for name in about if name not in derived}
        for name, high in derived.items():
            about[name]["of"] = high
        with written_aside(self._variants(weight)) as aside:
            whole = {name: part.contiguous() for name, part in stored.items()}
            save_file(whole, aside, {"variants": json.dumps(about, sort_keys=True)})

    def order(self, weight: str) -> Tensor:
        """Of the structures that a matrix reads, those that are kept longest first, (structures,) int64."""
        return self.variant(weight, ORDER)[0].clone().view(torch.int64)

    def errors(self, weight: str) -> dict[str, float]:
        """{format: expected squared output error} of one matrix."""
        return {name: float(row["error"]) for name, row in self._metadata(weight).items()}

    def alone(self, weight: str) -> dict[str, float]:
        """{format: about what its error would be} of one matrix, had those formats not been nested in each other."""
        return {name: float(row["alone"]) for name, row in self._metadata(weight).items() if "alone" in row}

    def notes(self, weight: str) -> list[str]:
        """What was out of the ordinary when this matrix was encoded, each remark once."""
        return list(dict.fromkeys(note for row in self._metadata(weight).values() for note in row["notes"]))

    def variant(self, weight: str, format_: str, which: Tensor | slice = ALL) -> Tensor:
        """The bytes of one variant, uint8 (data_rows, row_bytes), of all its rows or some: memory-mapped, or made of the one that it is
        nested in. Of a matrix that reads structures, the kept columns; of a masked one, all columns with the zeros in them."""
        with self._open(self._variants(weight)) as file:
            if mask_of(format_):
                dense = format_of(format_)
                return _masked(dense, file.get_tensor(dense)[which], file.get_tensor(format_)[which])
            if format_ in file.keys():  # noqa: SIM118  (safe_open isn't iterable)
                return _rows(format_, file.get_tensor(format_), which)
            high = json.loads(file.metadata()["variants"])[format_]["of"]
            data = _rows(high, file.get_tensor(high), which)
        return lowered(formats.get(high), formats.get(format_), data)

    def refined(self, config: Config) -> Variants:
        """Like `variant`, with the config's own matrices where it has them."""
        path = self.folder / refined_file(config)
        with self._open(path) as file:
            own = frozenset(file.keys())

        def variant(weight: str, format_: str, which: Tensor | slice = ALL) -> Tensor:
            if weight not in own:
                return self.variant(weight, format_, which)
            with self._open(path) as file:
                return _rows(format_, file.get_tensor(weight), which)

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


class Writing:
    """A safetensors file of variants, written some rows at a time. Errors and notes travel in its metadata.

    The header, which holds them, is written last, into a place that was kept for it.
    """

    def __init__(self, file: BinaryIO, shapes: Mapping[str, tuple[int, int]]) -> None:
        self._file, self._shapes = file, shapes
        sizes = [rows * row_bytes for rows, row_bytes in shapes.values()]
        ends = list(accumulate(sizes))
        self._places = {name: (end - size, end) for name, end, size in zip(shapes, ends, sizes, strict=True)}
        self._header_bytes = _NOTES_BYTES + _VARIANT_BYTES * len(shapes)
        self._errors = dict.fromkeys(shapes, 0.0)
        self._alone: dict[str, float] = {}
        self._notes: dict[str, dict[str, None]] = {name: {} for name in shapes}
        self._derived: dict[str, str] = {}

    def put(self, name: str, first: int, encoded: Encoded) -> None:
        """Rows from `first` on of one variant."""
        assert encoded.data.shape[1] == self._shapes[name][1], (name, encoded.data.shape)
        self._file.seek(self._header_bytes + self._places[name][0] + first * encoded.data.shape[1])
        self._file.write(encoded.data.contiguous().numpy().data)
        self._tell(name, encoded)

    def derive(self, name: str, high: str, encoded: Encoded) -> None:
        """Some rows of a variant that isn't written, as it is made of another: their error and notes."""
        self._derived[name] = high
        self._tell(name, encoded)

    def _tell(self, name: str, encoded: Encoded) -> None:
        self._errors[name] = self._errors.get(name, 0.0) + encoded.error
        self._notes.setdefault(name, {}).update(dict.fromkeys(encoded.notes))
        if encoded.alone is not None:
            self._alone[name] = self._alone.get(name, 0.0) + float(encoded.alone.sum())

    def close(self) -> None:
        about: dict[str, Any] = {name: {"error": self._errors[name], "notes": list(self._notes[name])} for name in self._errors}
        for name, high in self._derived.items():
            about[name]["of"] = high
        for name, error in self._alone.items():
            about[name]["alone"] = error
        header: dict[str, Any] = {"__metadata__": {"variants": json.dumps(about, sort_keys=True)}}
        for name, shape in self._shapes.items():
            header[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": list(self._places[name])}
        text = json.dumps(header).encode().ljust(self._header_bytes - 8)
        assert len(text) == self._header_bytes - 8, "more notes than there is room for"
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)


def _rows(choice: str, data: Tensor, which: Tensor | slice) -> Tensor:
    """Some of the rows of a variant, or of what lies beside it."""
    return formats.get(choice).rows(data, which) if choice in formats else data[which]


def _masked(dense: str, data: Tensor, mask: Tensor) -> Tensor:
    """The bytes of a floating-point variant, with zeros where the mask, eight weights a byte, has none."""
    format_ = formats.get(dense)
    assert isinstance(format_, CastFormat), dense
    values = format_.decode(data)
    return format_.encode(values.masked_fill_(~unpack(mask, values.shape[1]), 0))


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


@dataclass(frozen=True)
class Decoder:
    """Variants as numbers: an `elastic.model.Decoded`."""

    variants: Variants
    target: Target
    source: Source

    def __call__(self, weight: Weight, choice: str) -> Tensor:
        format_, stored = formats.get(format_of(choice)), self._stored(weight, choice)
        if _reads(weight, choice):
            level = format_.decode(stored) if stored.shape[1] else torch.empty(len(stored), 0)
            values = filled(level, self.variants(weight.name, ORDER)[0].clone().view(torch.int64), weight.shape[1])
        else:
            values = format_.decode(stored)
        order = self.target.row_order(self.source, weight)
        if order is not None:
            original = torch.empty_like(values)
            original[order] = values
            values = original
        return values.T.contiguous() if weight.transposed else values

    def inputs(self, weight: Weight, choice: str) -> Rounding | None:
        rounding = self.left_inputs(weight, choice)
        if rounding is None or not _reads(weight, choice):
            return rounding
        order = self.variants(weight.name, ORDER)[0].clone().view(torch.int64)
        size = weight.shape[1] // len(order)
        kept = torch.isin(torch.arange(len(order)), order[: kept_of(choice)])
        return Among(kept.repeat_interleave(size), rounding)

    def left_inputs(self, weight: Weight, choice: str) -> Rounding | None:
        """The same for a network from which the parts that a choice leaves out are gone."""
        format_ = formats.get(format_of(choice))
        return format_.inputs(self._stored(weight, choice)) if format_.rounds and kept_of(choice) != 0 else None

    def _stored(self, weight: Weight, choice: str) -> Tensor:
        parts = kept_of(choice) is not None
        return self.variants(weight.name, format_of(choice) if parts and not _reads(weight, choice) else choice)

    def matrices(self, space: Space, config: Config) -> Mapping[str, Tensor]:
        """Every decided matrix by name, decoded when it is asked for."""
        chosen = {w.name: (w, config[decision.key]) for decision in space.decisions for w in decision.unit.weights}
        return _Matrices(self, chosen)

    def rows(self, weight: Weight, format_: str, which: Tensor | slice) -> Tensor:
        assert self.target.row_order(self.source, weight) is None and not weight.transposed, weight
        return formats.get(format_).decode(self.variants(weight.name, format_, which))


def _reads(weight: Weight, choice: str) -> bool:
    """Whether a choice is about what is left of the structures that a matrix reads."""
    return kept_of(choice) is not None and weight.role in READERS


@dataclass(frozen=True)
class _Matrices(Mapping[str, Tensor]):
    decoder: Decoder
    chosen: Mapping[str, tuple[Weight, str]]

    def __getitem__(self, name: str) -> Tensor:
        return self.decoder(*self.chosen[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)
