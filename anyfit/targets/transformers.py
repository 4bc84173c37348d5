"""transformers: an ordinary folder that `AutoModelForCausalLM.from_pretrained` loads, with no anyfit installed but for codebooks of rows.

Integers are kept in the layout of the compressed-tensors package, codebooks of a matrix in that of aqlm, which whoever loads
the folder needs then; codebooks of rows in a layout of ours, for which `anyfit.transformers_plugin` is imported; a folder of
floating-point tensors needs transformers only. Integers become floating-point numbers before the first forward pass, and
tables when they are loaded, so such a folder is small on disk and to send, not in memory; codebooks of a matrix stay as they are.
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
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.architectures.coverage import passthrough
from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.errors import UserError
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.costs.stopwatch import Stopwatch
from anyfit.elastic.extracted import Extracted
from anyfit.formats import INTEGER_BITS
from anyfit.structure.cutting import MODULE, plain_changes, uneven_changes
from anyfit.structure.space import Storage
from anyfit.targets import aqlm, compressed_tensors, row_tables, transformers_check
from anyfit.targets.base import Check, Cut, CutTarget, Needs, Variants
from anyfit.targets.hub_layout import DTYPES, Layout, Place
from anyfit.targets.safetensors_file import EMPTY_BYTES, Slot, shard_names, shards, write_file, write_index
from anyfit.targets.torch_stopwatch import TorchStopwatch

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
LAYOUTS: tuple[Layout, ...] = (compressed_tensors.LAYOUT, row_tables.LAYOUT, *aqlm.LAYOUTS)
"""A folder has one of these, or plain tensors alone."""


class Transformers(CutTarget):
    name = "transformers"
    suffix = ""
    formats = (*DTYPES, *(name for layout in LAYOUTS for name in layout.formats))
    default_formats = ("F16", "BF16", *(f"int{bits}_sym" for bits in sorted(INTEGER_BITS, reverse=True)))

    def supports(self, source: Source) -> str | None:
        """The network came from such a folder, so there is none that can't go back into one."""
        return None

    def needs(self, config: Config) -> Needs:
        return layout_of(config.formats.values()).needs if set(config.formats.values()) - DTYPES.keys() else Needs()

    def space(self, source: Source, weights: Iterable[Weight], formats: Iterable[str]) -> Space:
        """See `Target.space`. Of the 16-bit types only the original's own is a choice where both are wanted.

        Raises `UserError` for formats that no folder can have together.
        """
        wanted = self.named(formats)
        model, weights, layout = source.skeleton(), list(weights), layout_of(wanted)
        decisions = tuple(self._decision(layout.place(model, weight), wanted, source) for weight in weights)
        fixed = [Slot.of(name, tensor) for name, tensor in source.passthrough.items()]
        num_shards = len(shards([*(slot.bytes_ for slot in fixed), *_largest(decisions)]))
        return Space(
            decisions=decisions,
            fixed_bytes=num_shards * EMPTY_BYTES + sum(slot.bytes_ for slot in fixed),
            fixed_stored_bytes=sum(slot.data_bytes for slot in fixed),
            num_parameters=sum(weight.num_weights for weight in weights) + sum(tensor.numel() for tensor in source.passthrough.values()),
        )

    def write(self, path: Path, source: Source, space: Space, config: Config, variants: Variants) -> int:
        model, layout = source.skeleton(), layout_of(config.formats.values())
        chosen = [(layout.place(model, weight), config[decision.key]) for decision in space.decisions for weight in decision.unit.weights]
        parts = [
            *(_Part.of(name, tensor) for name, tensor in source.passthrough.items()),
            *(_Part.variant(held, name, variants) for held, name in chosen),
        ]
        path.mkdir()
        num_fixed = len(source.passthrough)
        size = _write_weights(path, parts, [*(part.bytes_ for part in parts[:num_fixed]), *_largest(space.decisions)])
        quantization = layout.quantization_config(model, chosen)
        changes = {} if quantization is None else {"quantization_config": quantization}
        _write_rest(path, source, changes, _loading_dtype(parts, quantization))
        return size

    def check(self, path: Path, source: Source, config: Config, model: Extracted, tokens: Tensor) -> tuple[Check, ...]:
        return transformers_check.checks(layout_of(config.formats.values()), path, source, config, model, tokens)

    def dense(self, source: Source) -> str:
        """The format of a folder whose tensors all have one type."""
        own = _own_format(source)
        stored = {tensor.dtype for tensor in source.passthrough.values()}
        return own if own and stored <= {DTYPES[own]} else "F32"

    def storage(self, source: Source, formats: Sequence[str]) -> Storage:
        """In the original's type alone; in float32 where the original has several, so that none is rounded."""
        dense = self.dense(source)
        if others := [name for name in formats if name != dense]:
            raise UserError(
                f"A folder that transformers loads has parts left out or {others[0]}, not both.",
                remedy="Leave out --formats, or take --target onnxruntime.",
            )

        def bytes_(name: str, shape: torch.Size, format_: str) -> tuple[int, int]:
            slot = Slot(name, DTYPES[format_], tuple(shape))
            return slot.bytes_, slot.data_bytes

        whole, _ = passthrough(source.skeleton(), ())
        files = len(shards([bytes_(name, tensor.shape, dense)[0] for name, tensor in whole.items()]))
        return Storage(dense, bytes_, lambda *_: None, files * EMPTY_BYTES)

    def write_cut(self, path: Path, source: Source, cut: Cut) -> int:
        return write_cut(path, source, cut.model, DTYPES[self.dense(source)])

    def check_cut(self, path: Path, source: Source, cut: Cut, tokens: Tensor) -> tuple[Check, ...]:
        return transformers_check.cut_checks(path, source, cut.model, tokens)

    def stopwatch(self) -> Stopwatch:
        return TorchStopwatch()

    def _decision(self, held: Place, wanted: Sequence[str], source: Source) -> Decision:
        legal, refused = set(), {}
        own = _own_format(source)
        for name in wanted:
            if own in wanted and name in ("F16", "BF16") and name != own and own != "F32":
                refused[name] = f"{own}, the original's type, takes as many bytes and loses nothing"
                continue
            reason = held.refuses(name)
            substitute = name if reason is None else _substitute(held, name, own)
            legal.add(substitute)
            if reason is not None:
                refused[name] = f"{reason}; {substitute} takes its place"
        slots = {name: held.slots(name) for name in self.formats if name in legal}
        choices = tuple(Choice(name, sum(s.bytes_ for s in parts), sum(s.data_bytes for s in parts)) for name, parts in slots.items())
        return Decision(Unit(held.weight.name, (held.weight,)), choices, refused=refused)


def layout_of(names: Iterable[str]) -> Layout:
    """That of a folder in these formats. Raises `UserError` where there is none."""
    coded = [name for name in dict.fromkeys(names) if name not in DTYPES]
    layout = next((layout for layout in LAYOUTS if coded[:1] and coded[0] in layout.formats), LAYOUTS[0])
    together = [name for name in coded if name in layout.formats]
    if other := next((name for name in coded if name not in together), None):
        raise UserError(
            f"No folder that transformers loads can have {coded[0]} and {other}: one package reads all that isn't plain tensors.",
            remedy=f"Name some that go together, with F16 or BF16 beside them: --formats {','.join(together)},F16.",
        )
    return layout


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
    _write_rest(path, source, {}, dtype)
    return size


def write_cut(path: Path, source: Source, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> int:
    """Write the folder of a network that `structure.cutting.cut` made smaller to `path`, which doesn't exist yet; returns its weight
    files' bytes.

    `source`: the whole network's, of which the tokenizer and the rest are copied. Everything is cast to `dtype`. Where the network's
    own class can build one of these sizes the folder is an ordinary one. Otherwise its config has `per_layer_config`, and a file of
    Python beside the weights, which is run where the reader passes `trust_remote_code=True`; without it, transformers refuses.
    """
    architecture = architecture_of(model)
    changes, code = plain_changes(model, architecture, source.config), None
    if changes is None:
        changes, code = uneven_changes(model, architecture)
    kept, _ = passthrough(model, ())
    parts = [_Part.cast(name, tensor.shape, kept, dtype) for name, tensor in kept.items()]
    path.mkdir()
    size = _write_weights(path, parts, [part.bytes_ for part in parts])
    _write_rest(path, source, changes, dtype)
    if code is not None:
        (path / f"{MODULE}.py").write_text(code, encoding="utf-8")
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


def copy_companions(source: Source, folder: Path) -> None:
    """Copies of config.json, tokenizer, chat template and whatever else travels with the model."""
    for file in sorted(source.folder.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, folder / file.name)


def _write_rest(folder: Path, source: Source, changes: Mapping[str, Any], dtype: torch.dtype) -> None:
    """The companions, with a config.json with these `changes` that says how the weights are to be loaded."""
    copy_companions(source, folder)
    settings = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings |= changes
    (folder / "config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _loading_dtype(parts: Iterable[_Part], quantization: Mapping[str, Any] | None) -> torch.dtype:
    """The type to load in so that no stored value is rounded: that of all tensors where they agree."""
    stored = {slot.dtype for part in parts for slot in part.slots if slot.dtype.is_floating_point}
    return stored.pop() if len(stored) == 1 and quantization is None else torch.float32


def _own_format(source: Source) -> str | None:
    """The format that is the original's own type, by its config."""
    return next((name for name, dtype in DTYPES.items() if dtype == source.config.dtype), None)


def _substitute(held: Place, name: str, own: str | None) -> str:
    """The nearest format to one that is refused: one of the layout's where there is, otherwise 16 bits."""
    return held.substitute(name) or (own if own in ("F16", "BF16") else "F16")


TARGET = Transformers()
