"""Where a Hugging Face folder keeps codebooks of rows: a layout of ours, which `anyfit.transformers_plugin` reads.

No runtime that we know loads per-row tables on a processor; the paper's own kernels are for graphics processors and its own classes of
networks. A matrix is two tensors beside each other, `weight_codes`, uint8 (rows, columns * bits / 8), and `weight_tables`, float16 (rows,
entries), as `anyfit.formats.table` says. Loading makes an ordinary parameter of them, so it can belong to a module of any kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from anyfit.core.units import Weight
from anyfit.formats.table import TableFormat, looked_up
from anyfit.targets.safetensors_file import Slot

METHOD = "anyfit-tables"
"""What config.json calls the layout."""
CODES, TABLES = "weight_codes", "weight_tables"


def slots(weight: Weight, format_: TableFormat) -> tuple[Slot, ...]:
    """The tensors that a matrix takes."""
    rows, columns = weight.shape
    module = _module(weight)
    codes = Slot(f"{module}.{CODES}", torch.uint8, (rows, columns * format_.num_bits // 8))
    return (codes, Slot(f"{module}.{TABLES}", torch.float16, (rows, format_.entries)))


def tensors(weight: Weight, format_: TableFormat, data: Tensor) -> dict[str, Tensor]:
    """The variant's bytes, uint8 (rows, row_bytes), as those tensors."""
    parts = data[:, format_.overhead :], data[:, : format_.overhead].contiguous().view(torch.float16)
    return dict(zip((slot.name for slot in slots(weight, format_)), parts, strict=True))


def decode(weight: Weight, format_: TableFormat, stored: Mapping[str, Tensor]) -> Tensor:
    """The matrix that a reader makes of those tensors, float32, in the checkpoint's orientation."""
    codes, tables = (stored[slot.name] for slot in slots(weight, format_))
    values = read(codes, tables, format_.num_bits)
    return values.T if weight.transposed else values


def read(codes: Tensor, tables: Tensor, bits: int) -> Tensor:
    """Float32 (rows, columns): what the two tensors of a matrix stand for at so many bits, or at all that are stored if these are fewer."""
    stored = (tables.shape[1] + 4).bit_length() - 2
    high, low = TableFormat(stored), TableFormat(min(bits, stored))
    return looked_up(*low.read(high.lowered(low, torch.cat([tables.contiguous().view(torch.uint8), codes], 1))))


def quantization_config(chosen: Iterable[tuple[Weight, TableFormat]]) -> dict[str, Any]:
    """What config.json says of these matrices. `bits`: matrices that have more are read at so many."""
    chosen = list(chosen)
    return {
        "quant_method": METHOD,
        "bits": max(format_.num_bits for _, format_ in chosen),
        "transposed": [_module(weight) for weight, _ in chosen if weight.transposed],
    }


def _module(weight: Weight) -> str:
    return weight.name.removesuffix(".weight")
