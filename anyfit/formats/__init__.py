"""How weights are stored. One line a format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyfit.core.registry import Registry

if TYPE_CHECKING:
    from anyfit.formats.base import Format

GGUF_GRIDS = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q4_0", "Q5_1", "Q4_1", "IQ4_NL", "MXFP4", "TQ2_0")
INTEGER_BITS = range(2, 9)
INTEGER_GROUPS = {32: "", 64: "_g64", 128: "_g128"}
"""What a group's size adds to the name of an integer format."""

formats: Registry[Format] = Registry(
    "format",
    {
        **{name: f"anyfit.formats.gguf{'_k' if name.endswith('_K') else ''}:{name}" for name in GGUF_GRIDS},
        "F16": "anyfit.formats.floating:F16",
        "BF16": "anyfit.formats.floating:BF16",
        "F32": "anyfit.formats.floating:F32",
        **{
            f"int{bits}_{kind}{group}": f"anyfit.formats.integer:int{bits}_{kind}{group}"
            for group in INTEGER_GROUPS.values()
            for bits in INTEGER_BITS
            for kind in ("sym", "asym")
        },
    },
)
