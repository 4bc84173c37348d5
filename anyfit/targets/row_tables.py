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
from transformers import PreTrainedModel

from anyfit.core.units import Weight
from anyfit.formats import TABLE_BITS, formats
from anyfit.formats.table import TableFormat, looked_up
from anyfit.targets.base import Needs
from anyfit.targets.hub_layout import DTYPES, Layout, Place, below
from anyfit.targets.safetensors_file import Slot

METHOD = "anyfit-tables"
"""What config.json calls the layout."""
CODES, TABLES = "weight_codes", "weight_tables"
_NEEDS = """Loading it takes `pip install anyfit`. Codes become floating-point numbers then, which take as much memory as the original's.

Each row of a matrix has tables of its own, and the upper bits of its codes are the codes of every smaller size. So this folder can be read
at fewer bits, too:

```python
import anyfit.transformers_plugin
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained(FOLDER)
config.quantization_config["bits"] = 3  # matrices that are stored with more
model = AutoModelForCausalLM.from_pretrained(FOLDER, config=config)
```"""


class TablePlace(Place):
    """Codes, and the tables of all rows."""

    def _refuses(self, name: str) -> str | None:
        return _table(name).refuses(self.weight.shape)

    def substitute(self, name: str) -> str | None:
        """The finest of fewer bits that isn't refused: a row's tables may be longer than its codes."""
        fewer = (f"table{bits}" for bits in range(_table(name).num_bits - 1, TABLE_BITS[0] - 1, -1))
        return next((other for other in fewer if self.refuses(other) is None), None)

    def _slots(self, name: str) -> tuple[Slot, ...]:
        format_, (rows, columns) = _table(name), self.weight.shape
        codes = Slot(CODES, torch.uint8, (rows, columns * format_.num_bits // 8))
        return tuple(below(self.modules[0], slot) for slot in (codes, Slot(TABLES, torch.float16, (rows, format_.entries))))

    def _tensors(self, name: str, data: Tensor) -> dict[str, Tensor]:
        tables = data[:, : _table(name).overhead].contiguous().view(torch.float16)
        parts = {CODES: data[:, _table(name).overhead :], TABLES: tables}
        return {f"{self.modules[0]}.{part}": tensor for part, tensor in parts.items()}

    def _decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, tables = (tensors[f"{self.modules[0]}.{part}"] for part in (CODES, TABLES))
        values = read(codes, tables, _table(name).num_bits)
        return values.T if self.weight.transposed else values


class RowTables(Layout):
    """Codebooks of rows, of any sizes beside each other."""

    formats = tuple(f"table{bits}" for bits in reversed(TABLE_BITS))
    needs = Needs(_NEEDS, plugin="anyfit.transformers_plugin")

    def place(self, model: PreTrainedModel, weight: Weight) -> TablePlace:
        return TablePlace(weight, "")

    def quantization_config(self, model: PreTrainedModel, chosen: Iterable[tuple[Place, str]]) -> dict[str, Any] | None:
        """`bits`: matrices that have more are read at so many."""
        held = [(place, _table(name)) for place, name in chosen if name not in DTYPES]
        if not held:
            return None
        return {
            "quant_method": METHOD,
            "bits": max(format_.num_bits for _, format_ in held),
            "transposed": [place.modules[0] for place, _ in held if place.weight.transposed],
        }

    def lacks_runtime(self) -> str | None:
        return None


def read(codes: Tensor, tables: Tensor, bits: int) -> Tensor:
    """Float32 (rows, columns): what the two tensors of a matrix stand for at so many bits, or at all that are stored if these are fewer."""
    stored = (tables.shape[1] + 4).bit_length() - 2
    high, low = TableFormat(stored), TableFormat(min(bits, stored))
    return looked_up(*low.read(high.lowered(low, torch.cat([tables.contiguous().view(torch.uint8), codes], 1))))


def _table(name: str) -> TableFormat:
    format_ = formats.get(name)
    assert isinstance(format_, TableFormat), name
    return format_


LAYOUT = RowTables()
