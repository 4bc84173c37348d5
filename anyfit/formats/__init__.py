"""How weights are stored. One line a format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyfit.core.registry import Registry

if TYPE_CHECKING:
    from anyfit.formats.base import Format

_GGUF_MODULES = {
    "gguf": ("Q8_0", "Q5_0", "Q4_0", "Q5_1", "Q4_1", "IQ4_NL", "MXFP4", "TQ2_0"),
    "gguf_k": ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
    "gguf_iq": ("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
}
GGUF_GRIDS = tuple(name for names in _GGUF_MODULES.values() for name in names)
INTEGER_BITS = range(2, 9)
INTEGER_KINDS = {"sym": INTEGER_BITS, "asym": INTEGER_BITS, "offset": range(2, 5)}
"""{kind: its bits}, see `formats.integer`."""
INTEGER_GROUPS = {32: "", 64: "_g64", 128: "_g128"}
"""What a group's size adds to the name of an integer format."""
AQLM_SCHEMES = {f"aqlm_{codebooks}x8g{group}": (codebooks, group) for codebooks, group in ((2, 8), (1, 4), (1, 8))}
"""{name: codebooks of a matrix, columns of a group}, see `formats.aqlm`."""
TABLE_BITS = range(2, 9)
"""See `formats.table`."""

formats: Registry[Format] = Registry(
    "format",
    {
        **{name: f"anyfit.formats.{module}:{name}" for module, names in _GGUF_MODULES.items() for name in names},
        "F16": "anyfit.formats.floating:F16",
        "BF16": "anyfit.formats.floating:BF16",
        "F32": "anyfit.formats.floating:F32",
        **{
            f"int{bits}_{kind}{group}": f"anyfit.formats.integer:int{bits}_{kind}{group}"
            for group in INTEGER_GROUPS.values()
            for kind, all_bits in INTEGER_KINDS.items()
            for bits in all_bits
        },
        **{f"table{bits}": f"anyfit.formats.table:table{bits}" for bits in TABLE_BITS},
        **{name: f"anyfit.formats.aqlm:{name}" for name in AQLM_SCHEMES},
        **{name: f"anyfit.formats.w8a8:{name}" for name in ("int8_dynamic", "int8_static")},
    },
)
