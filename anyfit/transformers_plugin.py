"""Lets transformers load folders with codebooks of rows. Importing this module is all there is to do.

>>> import anyfit.transformers_plugin
>>> model = AutoModelForCausalLM.from_pretrained(folder)                            # doctest: +SKIP

The folder may be read at any smaller size, which needs no other file:

>>> config = AutoConfig.from_pretrained(folder)                                     # doctest: +SKIP
>>> config.quantization_config["bits"] = 3                                          # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(folder, config=config)             # doctest: +SKIP

Matrices become ordinary parameters when they are loaded, in the type that the model is loaded in: float32, as config.json says, loses
nothing. (A quantization_config that is given to `from_pretrained` isn't seen: transformers passes on those of its own methods alone.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from anyfit.core.errors import UserError
from anyfit.formats import TABLE_BITS
from anyfit.targets.row_tables import CODES, METHOD, TABLES, read


@register_quantization_config(METHOD)
class TablesConfig(QuantizationConfigMixin):
    """`bits`: matrices that have more are read at so many. `transposed`: modules whose parameter is (inputs, outputs)."""

    def __init__(self, bits: int, transposed: Sequence[str] = (), quant_method: str = METHOD) -> None:
        if bits not in TABLE_BITS:
            raise UserError(f"Codebooks can't be read at {bits!r} bits.", remedy=f"Take {TABLE_BITS.start} to {TABLE_BITS.stop - 1}.")
        self.quant_method, self.bits, self.transposed = quant_method, bits, list(transposed)
        self.dequantize = True  # what is loaded is an ordinary model, and is saved as one


@register_quantizer(METHOD)
class TablesQuantizer(HfQuantizer):
    """Loads, and does nothing else."""

    requires_calibration = True
    serialized_names: ClassVar[dict[str, list[str]]] = {"weight": [CODES, TABLES]}
    quantization_config: TablesConfig

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": _LookUp}

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


class _LookUp(ConversionOps):
    """The two tensors of a module to its weight."""

    def __init__(self, hf_quantizer: TablesQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, list[Tensor]], *, model: PreTrainedModel, full_layer_name: str, **_: Any) -> dict[str, Tensor]:
        config, name = self.hf_quantizer.quantization_config, full_layer_name
        codes, tables = (input_dict[part][0] for part in (CODES, TABLES))
        values = read(codes, tables, config.bits)
        if name.removesuffix(".weight") in config.transposed:
            values = values.T.contiguous()
        return {name: values.to(model.get_parameter(name).dtype)}
