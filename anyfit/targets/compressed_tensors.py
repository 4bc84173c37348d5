"""Where a Hugging Face folder keeps a matrix of small integers: the layout of compressed-tensors.

Found in its source and by loading files (0.15 to 0.20 with transformers 5.23), and checked again on every export:

- A `Linear` of its own is `pack-quantized`: codes as a dense stream of bits in 32-bit words, scales in half precision.
- Asymmetric groups don't load there under the `group` strategy (the loader expects zero points of another shape
  than it then unpacks). As `block`s of 1 x 32 the same groups do, with zero points of one byte each; or of two, halves that
  needn't be whole, where `zp_dtype` says so.
- A table (`Embedding`) loads only under its plain name, so as whole bytes: `naive-quantized`, 8 bits. The same goes for
  a head tied to it, which needs a copy of the scales under its own name.
- Scales are cast to the type that the model is loaded in. Half precision and float32 keep them; bfloat16 rounds them.
  So the folder's config.json asks for float32.
- The dense stream is read by version 0.18 and later; earlier ones refuse the shapes of 3, 5, 6 and 7 bits.
- `dequantize=True` at loading uses the first group's scheme for all modules: wrong without an error where formats are mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.core.units import Weight
from anyfit.formats import formats
from anyfit.formats.base import CastFormat
from anyfit.formats.fields import pack_dense, unpack_dense
from anyfit.formats.integer import IntegerFormat
from anyfit.formats.table import TableFormat
from anyfit.targets import row_tables
from anyfit.targets.safetensors_file import Slot

VERSION = "0.18.0"
"""The oldest version of compressed-tensors that reads every file written here."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PACKED, _BYTES = "pack-quantized", "naive-quantized"


@dataclass(frozen=True)
class Place:
    """One matrix in the file. `form` is how its integers are kept; None where they can't be, and `problem` says why."""

    weight: Weight
    form: str | None
    problem: str = ""

    @property
    def modules(self) -> list[str]:
        """Paths of the modules that share the matrix, the one that it is stored for first."""
        return [name.removesuffix(".weight") for name in (self.weight.name, *self.weight.tied)]

    def refuses(self, name: str) -> str | None:
        """Why this matrix can't be stored in a format; None where it can."""
        format_ = formats.get(name)
        if isinstance(format_, CastFormat):
            return None
        if isinstance(format_, TableFormat):
            return format_.refuses(self.weight.shape)
        assert isinstance(format_, IntegerFormat), name
        if self.form is None:
            return self.problem
        if self.form == _BYTES and format_.num_bits != 8:
            return "a table, like a matrix that several modules share, loads only as whole bytes"
        return format_.refuses(self.weight.shape)

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The tensors that the matrix takes in a format."""
        if name in DTYPES:
            shape = self.weight.shape[::-1] if self.weight.transposed else self.weight.shape
            return (Slot(self.weight.name, DTYPES[name], shape),)
        if table := _table(name):
            return row_tables.slots(self.weight, table)
        format_ = _integer(name)
        rows, columns = self.weight.shape
        per_group = [Slot("weight_scale", torch.float16, (rows, columns // format_.group))]
        if not format_.symmetric:
            zero = torch.float16 if format_.kind == "offset" else torch.int8
            per_group.append(Slot("weight_zero_point", zero, (rows, columns // format_.group)))
        if self.form == _PACKED:
            words = Slot("weight_packed", torch.int32, (rows, columns * format_.num_bits // 32))
            original = Slot("weight_shape", torch.int64, (2,))
            return tuple(_below(self.modules[0], slot) for slot in (words, original, *per_group))
        codes = Slot("weight", torch.int8, (rows, columns))
        return (_below(self.modules[0], codes), *(_below(module, slot) for module in self.modules for slot in per_group))

    def tensors(self, name: str, data: Tensor) -> dict[str, Tensor]:
        """The variant's bytes, uint8 (rows, row_bytes), as those tensors."""
        if name in DTYPES:
            values = data.clone().view(DTYPES[name])
            return {self.weight.name: values.T if self.weight.transposed else values}
        if table := _table(name):
            return row_tables.tensors(self.weight, table, data)
        format_ = _integer(name)
        codes, scale, zero = format_.unpack(data)
        parts = {"weight_scale": scale.half()}
        if format_.kind == "offset":
            assert zero is not None
            parts["weight_zero_point"] = (zero - 2 ** (format_.num_bits - 1)).half()
        elif zero is not None:
            parts["weight_zero_point"] = _signed(zero, format_.num_bits)
        if self.form == _PACKED:
            parts |= {
                "weight_packed": pack_dense(codes, format_.num_bits).view(torch.int32),
                "weight_shape": torch.tensor(self.weight.shape),
            }
            return {f"{self.modules[0]}.{part}": tensor for part, tensor in parts.items()}
        copies = {f"{module}.{part}": tensor for module in self.modules for part, tensor in parts.items()}
        return {self.weight.name: _signed(codes, format_.num_bits), **copies}

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrix that a reader makes of those tensors, float32, in the checkpoint's orientation."""
        if name in DTYPES:
            return tensors[self.weight.name].float()
        if table := _table(name):
            return row_tables.decode(self.weight, table, tensors)
        format_ = _integer(name)
        module = self.modules[0]
        if self.form == _PACKED:
            codes = unpack_dense(tensors[f"{module}.weight_packed"].view(torch.uint8), format_.num_bits)
            codes = _signed(codes, format_.num_bits)
        else:
            codes = tensors[self.weight.name]
        groups = codes.float().unflatten(1, (-1, format_.group))
        if not format_.symmetric:
            groups = groups - tensors[f"{module}.weight_zero_point"].float().unsqueeze(-1)
        return (groups * tensors[f"{module}.weight_scale"].float().unsqueeze(-1)).flatten(1)

    def scheme(self, name: str) -> dict[str, Any] | None:
        """What the folder's config says of a format here; None for a plain tensor."""
        if name in DTYPES:
            return None
        format_ = _integer(name)
        spread: dict[str, Any] = {"strategy": "group", "group_size": format_.group}
        if not format_.symmetric:
            spread = {"strategy": "block", "block_structure": [1, format_.group]}
            if format_.kind == "offset":
                spread["zp_dtype"] = "float16"
        return {
            "format": self.form,
            "weights": {"num_bits": format_.num_bits, "type": "int", "symmetric": format_.symmetric, **spread},
        }


def place(model: PreTrainedModel, weight: Weight) -> Place:
    """How a folder can keep a matrix of this network, which may be on meta."""
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in (weight.name, *weight.tied)]
    if not all(isinstance(module, nn.Linear | nn.Embedding) for module in modules):
        kind = next(type(module).__name__ for module in modules if not isinstance(module, nn.Linear | nn.Embedding))
        return Place(weight, None, f"compressed-tensors reads integers into Linear and Embedding modules only, and this is a {kind}")
    if any(dict(module.named_buffers(recurse=False)) for module in modules):
        kind = type(modules[0]).__name__
        return Place(weight, None, f"compressed-tensors takes the buffer of a {kind} for a parameter that the file should hold")
    if odd := next((m for m in modules if type(m).forward not in (nn.Linear.forward, nn.Embedding.forward)), None):
        return Place(weight, None, f"compressed-tensors replaces the forward of a Linear, and {type(odd).__name__} has one of its own")
    alone = len(modules) == 1 and isinstance(modules[0], nn.Linear)
    return Place(weight, _PACKED if alone else _BYTES)


def quantization_config(model: PreTrainedModel, chosen: Iterable[tuple[Place, str]]) -> dict[str, Any] | None:
    """What config.json says of (matrix, format) pairs; None where all are plain tensors. Tables and integers aren't mixed.

    One group for each scheme, with the modules by name. Linear modules in no group are listed as ignored.
    """
    groups: dict[str, dict[str, Any]] = {}
    chosen = list(chosen)
    if tables := [(held.weight, table) for held, name in chosen if (table := _table(name))]:
        assert len(tables) == sum(name not in DTYPES for _, name in chosen), "one loader for a folder"
        return row_tables.quantization_config(tables)
    for held, name in chosen:
        scheme = held.scheme(name)
        if scheme is not None:
            group = groups.setdefault(f"{name} {scheme['format']}", {"targets": [], **scheme})
            group["targets"] += held.modules
    if not groups:
        return None
    targeted = {module for group in groups.values() for module in group["targets"]}
    linear = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": dict(sorted(groups.items())),
        "ignore": [path for path in linear if path not in targeted],
    }


def _integer(name: str) -> IntegerFormat:
    format_ = formats.get(name)
    assert isinstance(format_, IntegerFormat), name
    return format_


def _table(name: str) -> TableFormat | None:
    format_ = formats.get(name)
    return format_ if isinstance(format_, TableFormat) else None


def _below(module: str, slot: Slot) -> Slot:
    return Slot(f"{module}.{slot.name}", slot.dtype, slot.shape)


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes as the signed integers of the same width, int8."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
