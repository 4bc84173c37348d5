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
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.core.units import Weight
from anyfit.formats import INTEGER_BITS, INTEGER_GROUPS, INTEGER_KINDS, formats
from anyfit.formats.fields import pack_dense, unpack_dense
from anyfit.formats.integer import IntegerFormat
from anyfit.targets.base import Needs
from anyfit.targets.hub_layout import DTYPES, Layout, Place, below, modules_of
from anyfit.targets.safetensors_file import Slot

VERSION = "0.18.0"
"""The oldest version of compressed-tensors that reads every file written here."""
_PACKED, _BYTES = "pack-quantized", "naive-quantized"


@dataclass(frozen=True)
class IntegerPlace(Place):
    """`form` is how its integers are kept; None where they can't be."""

    form: str | None

    def _refuses(self, name: str) -> str | None:
        format_ = _integer(name)
        if self.form == _BYTES and format_.num_bits != 8:
            return "a table, like a matrix that several modules share, loads only as whole bytes"
        return format_.refuses(self.weight.shape)

    def substitute(self, name: str) -> str | None:
        """Eight bits, where these load."""
        eight = f"int8_{name.partition('_')[2]}".replace("offset", "asym")
        return eight if self.refuses(eight) is None else None

    def _slots(self, name: str) -> tuple[Slot, ...]:
        format_ = _integer(name)
        rows, columns = self.weight.shape
        per_group = [Slot("weight_scale", torch.float16, (rows, columns // format_.group))]
        if not format_.symmetric:
            zero = torch.float16 if format_.kind == "offset" else torch.int8
            per_group.append(Slot("weight_zero_point", zero, (rows, columns // format_.group)))
        if self.form == _PACKED:
            words = Slot("weight_packed", torch.int32, (rows, columns * format_.num_bits // 32))
            original = Slot("weight_shape", torch.int64, (2,))
            return tuple(below(self.modules[0], slot) for slot in (words, original, *per_group))
        codes = Slot("weight", torch.int8, (rows, columns))
        return (below(self.modules[0], codes), *(below(module, slot) for module in self.modules for slot in per_group))

    def _tensors(self, name: str, data: Tensor) -> dict[str, Tensor]:
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

    def _decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
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


class CompressedTensors(Layout):
    """Integers."""

    formats = tuple(
        f"int{bits}_{kind}{group}"
        for bits in sorted(INTEGER_BITS, reverse=True)
        for kind in ("offset", "asym", "sym")
        if bits in INTEGER_KINDS[kind]
        for group in INTEGER_GROUPS.values()
    )
    needs = Needs(
        f"anyfit is not needed. Loading it takes `pip install 'compressed-tensors>={VERSION}'`; integers become floating-point numbers "
        "before the first forward pass, so it is small on disk, not in memory."
    )

    def place(self, model: PreTrainedModel, weight: Weight) -> IntegerPlace:
        modules = modules_of(model, weight)
        if not all(isinstance(module, nn.Linear | nn.Embedding) for module in modules):
            kind = next(type(module).__name__ for module in modules if not isinstance(module, nn.Linear | nn.Embedding))
            problem = f"compressed-tensors reads integers into Linear and Embedding modules only, and this is a {kind}"
            return IntegerPlace(weight, problem, None)
        if any(dict(module.named_buffers(recurse=False)) for module in modules):
            kind = type(modules[0]).__name__
            problem = f"compressed-tensors takes the buffer of a {kind} for a parameter that the file should hold"
            return IntegerPlace(weight, problem, None)
        if odd := next((m for m in modules if type(m).forward not in (nn.Linear.forward, nn.Embedding.forward)), None):
            problem = f"compressed-tensors replaces the forward of a Linear, and {type(odd).__name__} has one of its own"
            return IntegerPlace(weight, problem, None)
        alone = len(modules) == 1 and isinstance(modules[0], nn.Linear)
        return IntegerPlace(weight, "", _PACKED if alone else _BYTES)

    def quantization_config(self, model: PreTrainedModel, chosen: Iterable[tuple[Place, str]]) -> dict[str, Any] | None:
        """One group for each scheme, with the modules by name. Linear modules in no group are listed as ignored."""
        groups: dict[str, dict[str, Any]] = {}
        for held, name in chosen:
            assert isinstance(held, IntegerPlace)
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

    def lacks_runtime(self) -> str | None:
        needed = f"compressed-tensors>={VERSION}"
        install = "pip install 'anyfit[compressed]'"
        try:
            installed = version("compressed-tensors")
        except PackageNotFoundError:
            return f"loading integers needs {needed}, which is not installed; {install}"
        if Version(installed) < Version(VERSION):
            return f"loading these integers needs {needed}, and {installed} is installed; {install}"
        return None


def _integer(name: str) -> IntegerFormat:
    format_ = formats.get(name)
    assert isinstance(format_, IntegerFormat), name
    return format_


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes as the signed integers of the same width, int8."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


LAYOUT = CompressedTensors()
