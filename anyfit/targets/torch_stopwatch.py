"""Networks ready to be timed in plain torch, which is what transformers runs them in: integers are unpacked before that."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from anyfit import network
from anyfit.costs.latency import PREFILL, Setting
from anyfit.costs.stopwatch import Run, Stopwatch
from anyfit.interface import interface_of

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TorchStopwatch(Stopwatch):
    formats = tuple(_DTYPES)

    def __init__(self) -> None:
        self.runtime = f"torch {torch.__version__}"

    def ready(self, model: PreTrainedModel, format_: str, setting: Setting, threads: int, folder: Path) -> Run:
        _fill(model)
        model.to(_DTYPES[format_])
        interface = interface_of(model.config)
        tokens = interface.example(model.config, setting.batch, setting.sequence)
        if setting.phase == PREFILL:
            return torch.no_grad()(lambda: interface(model, tokens))
        cache = DynamicCache(config=model.config)
        _logits(model, tokens, cache)

        def decode() -> None:
            _logits(model, tokens[:, :1], cache)
            cache.crop(-1)

        return decode


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor, cache: DynamicCache) -> Tensor:
    found: Tensor = network.with_cache(model, tokens, cache).logits
    return found


def _fill(model: PreTrainedModel) -> None:
    """Numbers of the size that a network's are, ties kept."""
    rng = torch.Generator().manual_seed(0)
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in filled:
                numbers = 0.02 * torch.randn(parameter.shape, generator=rng)
                filled[id(parameter)] = nn.Parameter(numbers, requires_grad=False)
            setattr(module, name, filled[id(parameter)])
