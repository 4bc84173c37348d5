"""Ways to choose the codes of a matrix. One line a quantizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyfit.core.registry import Registry

if TYPE_CHECKING:
    from anyfit.quantizers.base import Quantizer

quantizers: Registry[Quantizer] = Registry(
    "quantizer",
    {
        "rtn": "anyfit.quantizers.rtn:QUANTIZER",
        "gptq": "anyfit.quantizers.gptq:QUANTIZER",
    },
)
