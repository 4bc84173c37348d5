"""transformers: an ordinary folder that `AutoModelForCausalLM.from_pretrained` loads, with no anyfit installed but for codebooks.

Integers are kept in the layout of the compressed-tensors package, which whoever loads the folder needs then; a
folder of floating-point tensors needs transformers only. Codebooks of rows are kept in a layout of ours, for which
`anyfit.transformers_plugin` is imported. transformers unpacks the integers before the first forward pass and codebooks
when it loads, so such a folder is small on disk and to send, not in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.errors import UnknownNameError
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.elastic.extracted import Extracted
from anyfit.formats import INTEGER_BITS, INTEGER_GROUPS, INTEGER_KINDS, TABLE_BITS
from anyfit.targets import compressed_tensors, transformers_check
from anyfit.targets.base import Check, Target, Variants
from anyfit.targets.compressed_tensors import DTYPES, Place
from anyfit.targets.safetensors_file import EMPTY_BYTES, Slot, shard_names, shards, write_file, write_index

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_DEAREST_FIRST = sorted(INTEGER_BITS, reverse=True)
_TABLES = tuple(f"table{bits}" for bits in sorted(TABLE_BITS, reverse=True))


class Transformers(Target):
    name = "transformers"
    suffix = ""
    formats = (
        *("F32", "F16", "BF16"),
        *(
            f"int{bits}_{kind}{group}"
            for bits in _DEAREST_FIRST
            for kind in ("offset", "asym", "sym")
            if bits in INTEGER_KINDS[kind]
            for group in INTEGER_GROUPS.values()
        ),
        *_TABLES,
    )
    default_formats = ("F16", "BF16", *(f"int{bits}_sym" for bits in _DEAREST_FIRST))

    def supports(self, source: Source) -> str | None:
        """The network came from such a folder, so there is none that can't go back into one."""
        return None

    def space(self, source: Source, weights: Iterable[Weight], formats: Iterable[str]) -> Space:
        """See `Target.space`. Of the 16-bit types only the original's own is a choice where both are wanted."""
        wanted = list(dict.fromkeys(formats))
        for name in wanted:
            if name not in self.formats:
                raise UnknownNameError(f"format of {self.name}", name, self.formats)
        model, weights = source.skeleton(), list(weights)
        decisions = tuple(self._decision(compressed_tensors.place(model, weight), wanted, source) for weight in weights)
        fixed = [Slot.of(name, tensor) for name, tensor in source.passthrough.items()]
        num_shards = len(shards([*(slot.bytes_ for slot in fixed), *_largest(decisions)]))
        return Space(
            decisions=decisions,
            fixed_bytes=num_shards * EMPTY_BYTES + sum(slot.bytes_ for slot in fixed),
            fixed_stored_bytes=sum(slot.data_bytes for slot in fixed),
            num_parameters=sum(weight.num_weights for weight in weights) + sum(tensor.numel() for tensor in source.passthrough.values()),
        )

    def write(self, path: Path, source: Source, space: Space, config: Config, variants: Variants) -> int:
        model = source.skeleton()
        chosen = [
            (compressed_tensors.place(model, weight), config[decision.key])
            for decision in space.decisions
            for weight in decision.unit.weights
        ]
        parts = [
            *(_Part.of(name, tensor) for name, tensor in source.passthrough.items()),
            *(_Part.variant(held, name, variants) for held, name in chosen),
        ]
        path.mkdir()
        num_fixed = len(source.passthrough)
        size = _write_weights(path, parts, [*(part.bytes_ for part in parts[:num_fixed]), *_largest(space.decisions)])
        quantization = compressed_tensors.quantization_config(model, chosen)
        _write_rest(path, source, quantization, _loading_dtype(parts, quantization))
        return size

    def check(self, path: Path, source: Source, config: Config, model: Extracted, tokens: Tensor) -> tuple[Check, ...]:
        return transformers_check.checks(path, source, config, model, tokens)

    def _decision(self, held: Place, wanted: Sequence[str], source: Source) -> Decision:
        legal, refused = set(), {}
        own = _own_format(source)
        for name in wanted:
            if reason := _beaten(held, name, own if own in wanted else None) or _unmixed(name, wanted):
                refused[name] = reason
                continue
            reason = held.refuses(name)
            substitute = name if reason is None else _substitute(held, name, own)
            legal.add(substitute)
            if reason is not None:
                refused[name] = f"{reason}; {substitute} takes its place"
        slots = {name: held.slots(name) for name in self.formats if name in legal}
        choices = tuple(Choice(name, sum(s.bytes_ for s in parts), sum(s.data_bytes for s in parts)) for name, parts in slots.items())
        return Decision(Unit(held.weight.name, (held.weight,)), choices, refused=refused)


def write_dense(path: Path, source: Source, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> int:
    """Write the ordinary folder of an extracted model to `path`, which doesn't exist yet; returns its weight files' bytes.

    `weights` are the decided matrices as `Source.build` takes them: decoded, by parameter name, in the checkpoint's
    orientation. They are asked for one at a time, so a mapping may decode them when asked. Everything is cast to
    `dtype`; float32 keeps every value. A tensor with several names is stored under one.
    """
    model = source.skeleton()
    parts = [_Part.cast(name, tensor.shape, source.passthrough, dtype) for name, tensor in source.passthrough.items()]
    parts += [_Part.cast(name, model.get_parameter(name).shape, weights, dtype) for name in weights]
    path.mkdir()
    size = _write_weights(path, parts, [part.bytes_ for part in parts])
    _write_rest(path, source, None, dtype)
    return size


@dataclass(frozen=True)
class _Part:
    """Tensors that belong together, made when their turn to be written comes."""

    slots: tuple[Slot, ...]
    make: Callable[[], Mapping[str, Tensor]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> _Part:
        return cls((Slot.of(name, tensor),), lambda: {name: tensor})

    @classmethod
    def variant(cls, held: Place, name: str, variants: Variants) -> _Part:
        return cls(held.slots(name), lambda: held.tensors(name, variants(held.weight.name, name)))

    @classmethod
    def cast(cls, name: str, shape: torch.Size, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> _Part:
        return cls((Slot(name, dtype, tuple(shape)),), lambda: {name: tensors[name].to(dtype)})

    @property
    def bytes_(self) -> int:
        return sum(slot.bytes_ for slot in self.slots)


def _largest(decisions: Iterable[Decision]) -> list[int]:
    """What files are planned with, so that one space has the same number of files whatever the config."""
    return [max(choice.bytes_ for choice in decision.choices) for decision in decisions]


def _write_weights(folder: Path, parts: Sequence[_Part], planned: Sequence[int]) -> int:
    """The weight files, and their index where there are several. Returns their bytes."""
    plan = shards(planned)
    files = dict(zip(shard_names(len(plan)), ([parts[index] for index in shard] for shard in plan), strict=True))
    size = 0
    for file, held in files.items():
        size += write_file(folder / file, (s for part in held for s in part.slots), (pair for part in held for pair in part.make().items()))
    if len(files) > 1:
        write_index(folder, {file: [slot for part in held for slot in part.slots] for file, held in files.items()})
    return size


def _write_rest(folder: Path, source: Source, quantization: Mapping[str, Any] | None, dtype: torch.dtype) -> None:
    """config.json, and copies of tokenizer, chat template and whatever else travels with the model."""
    for file in sorted(source.folder.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    settings = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    if quantization is not None:
        settings["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _loading_dtype(parts: Iterable[_Part], quantization: Mapping[str, Any] | None) -> torch.dtype:
    """The type to load in so that no stored value is rounded: that of all tensors where they agree."""
    stored = {slot.dtype for part in parts for slot in part.slots if slot.dtype.is_floating_point}
    return stored.pop() if len(stored) == 1 and quantization is None else torch.float32


def _own_format(source: Source) -> str | None:
    """The format that is the original's own type, by its config."""
    return next((name for name, dtype in DTYPES.items() if dtype == source.config.dtype), None)


def _beaten(held: Place, name: str, own: str | None) -> str | None:
    """Why a format is of no use beside the original's `own`; None where it is."""
    if own is None or name == own:
        return None
    if name in ("F16", "BF16") and own != "F32":
        return f"{own}, the original's type, takes as many bytes and loses nothing"
    if name in _TABLES and held.refuses(name) is None and _data_bytes(held, name) >= _data_bytes(held, own):
        return f"its tables are longer than rows are worth: {own}, the original's type, takes no more bytes and loses nothing"
    return None


def _unmixed(name: str, wanted: Sequence[str]) -> str | None:
    """A folder has one loader for all that isn't floating-point."""
    if name in _TABLES and any(other not in DTYPES and other not in _TABLES for other in wanted):
        return "a folder holds integers or tables, as different packages read them: leave the integers out to have tables"
    return None


def _data_bytes(held: Place, name: str) -> int:
    return sum(slot.data_bytes for slot in held.slots(name))


def _substitute(held: Place, name: str, own: str | None) -> str:
    """The nearest format to one that is refused: 8 bits where these load, otherwise 16."""
    if name in _TABLES:
        return own if own in ("F16", "BF16") else "F16"
    eight = f"int8_{name.partition('_')[2]}".replace("offset", "asym")
    if held.refuses(eight) is None:
        return eight
    return own if own in ("F16", "BF16") else "F16"


TARGET = Transformers()
