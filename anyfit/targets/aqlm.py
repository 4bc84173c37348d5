"""Where a Hugging Face folder keeps additive codebooks: the layout of the aqlm package.

Found in its source (1.1.7) and by loading files with transformers 5.24, and checked again on every export:

- A `Linear` becomes three tensors: `codes` int8 (outputs, groups, codebooks), `codebooks` (codebooks, entries, 1, group) and `scales`
  (outputs, 1, 1, 1). Nothing but a `Linear` is replaced, and a tied one isn't read.
- One folder has one number of codebooks and one size of groups. All `Linear` modules are replaced but those in a list. transformers 5 takes
  its entries for the beginning or the end of modules' names; versions before compared parameters' names, so both are there.
- On a CPU the package computes in float32, for any number of codebooks of 256 entries; on a graphics processor it has fast kernels for
  2x8g8 and 1x8g8. Halves are exact in either.
- **Its CPU kernel is right in one thread only**: groups are shared out to threads which add to the same outputs at once. With
  NUMBA_NUM_THREADS=2 logits are off by several times their spread, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.core.units import Weight
from anyfit.formats import AQLM_SCHEMES, formats
from anyfit.formats.aqlm import ENTRIES, AdditiveFormat
from anyfit.targets.base import Needs
from anyfit.targets.hub_layout import DTYPES, Layout, Place, below, modules_of
from anyfit.targets.safetensors_file import Slot

VERSION = "1.1.7"
"""The version of aqlm that the above was found in."""


class AdditivePlace(Place):
    """In codebooks, or not at all."""

    def _refuses(self, name: str) -> str | None:
        return _additive(name).refuses(self.weight.shape)

    def _slots(self, name: str) -> tuple[Slot, ...]:
        format_, (rows, columns) = _additive(name), self.weight.shape
        parts = (
            Slot("codes", torch.int8, (rows, columns // format_.group, format_.num_codebooks)),
            Slot("codebooks", torch.float16, (format_.num_codebooks, ENTRIES, 1, format_.group)),
            Slot("scales", torch.float16, (rows, 1, 1, 1)),
        )
        return tuple(below(self.modules[0], slot) for slot in parts)

    def _tensors(self, name: str, data: Tensor) -> dict[str, Tensor]:
        parts = _additive(name).read(data)
        tensors = {
            "codes": parts.codes.contiguous().view(torch.int8),
            "codebooks": parts.codebooks.unsqueeze(2),
            "scales": parts.scales.view(-1, 1, 1, 1),
        }
        return {f"{self.modules[0]}.{part}": tensor for part, tensor in tensors.items()}

    def _decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        codes, codebooks, scales = (tensors[f"{self.modules[0]}.{part}"] for part in ("codes", "codebooks", "scales"))
        places = codes.long() % ENTRIES
        entries = [book[places[..., number], 0].float() for number, book in enumerate(codebooks)]
        return (torch.stack(entries).sum(0) * scales.float().view(-1, 1, 1)).flatten(1)


class Aqlm(Layout):
    """Linear modules in codebooks of one number and size."""

    needs = Needs(
        "anyfit is not needed. Loading it takes `pip install aqlm`; the codebooks stay as they are in memory. On a CPU say "
        "`NUMBA_NUM_THREADS=1` in the environment: in several threads the package's kernel gives wrong results without a word."
    )

    def __init__(self, name: str) -> None:
        self.formats = (name,)

    def place(self, model: PreTrainedModel, weight: Weight) -> AdditivePlace:
        modules = modules_of(model, weight)
        if odd := next((module for module in modules if not isinstance(module, nn.Linear)), None):
            return AdditivePlace(weight, f"aqlm reads codebooks into Linear modules only, and this is a {type(odd).__name__}")
        if len(modules) > 1:
            return AdditivePlace(weight, "aqlm reads codebooks into modules that share their matrix with no other")
        if type(modules[0]).forward is not nn.Linear.forward:
            return AdditivePlace(weight, f"aqlm replaces Linear modules, and {type(modules[0]).__name__} has a forward of its own")
        return AdditivePlace(weight, "")

    def quantization_config(self, model: PreTrainedModel, chosen: Iterable[tuple[Place, str]]) -> dict[str, Any] | None:
        held = {place.modules[0] for place, name in chosen if name not in DTYPES}
        if not held:
            return None
        scheme = _additive(self.formats[0])
        plain = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in held]
        return {
            "quant_method": "aqlm",
            "num_codebooks": scheme.num_codebooks,
            "nbits_per_codebook": ENTRIES.bit_length() - 1,
            "in_group_size": scheme.group,
            "out_group_size": 1,
            "linear_weights_not_to_quantize": [entry for path in plain for entry in (path, f"{path}.weight")],
        }

    def lacks_runtime(self) -> str | None:
        try:
            version("aqlm")
        except PackageNotFoundError:
            return "loading codebooks needs aqlm, which is not installed; pip install 'anyfit[aqlm]'"
        return None

    def environment(self) -> dict[str, str]:
        return {"NUMBA_NUM_THREADS": "1"}


def _additive(name: str) -> AdditiveFormat:
    format_ = formats.get(name)
    assert isinstance(format_, AdditiveFormat), name
    return format_


LAYOUTS = tuple(map(Aqlm, AQLM_SCHEMES))
