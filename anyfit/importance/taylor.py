"""Structures by how much the loss changes with them, to first order.

Paper: "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, section 3.1. A gate of one stands before every structure;
the loss changes by the gate's gradient when the structure is removed, and its square, averaged over texts, is the importance. That
gradient is the sum of activation times gradient over the structure, which is what LLM-Pruner (arXiv 2305.11627) sums over the weights.

Differences from the paper, and why:

* A text is a segment, and its loss the mean over its tokens: the paper averages over batches, so that what it finds depends on their
  size.
* The loss is that of the text itself, not of labels that the network would choose. The latter would make it the diagonal of Fisher's
  information.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.importance.base import NetworkImportance
from anyfit.interface import Interface
from anyfit.progress import Progress
from anyfit.structure.levels import Structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SEGMENTS_TOGETHER = 4


class Taylor(NetworkImportance):
    def __init__(self, name: str, *, repairs: bool) -> None:
        self.name, self.repairs = name, repairs

    def scores(
        self, model: PreTrainedModel, architecture: Architecture, structures: Mapping[str, Structure], segments: Tensor, progress: Progress
    ) -> dict[str, Tensor]:
        found = {name: torch.zeros(structure.num, dtype=torch.float64) for name, structure in structures.items()}
        with progress.stage("importance", len(segments)) as stage, torch.enable_grad():
            for some in segments.split(_SEGMENTS_TOGETHER):
                with _gated(model, architecture, structures, len(some)) as gates:
                    logits = model(input_ids=some.to(model.device), use_cache=False).logits[:, :-1].float()
                    losses = functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten().to(logits.device), reduction="sum")
                    gradients = torch.autograd.grad(losses / (some.shape[1] - 1), list(gates.values()))
                for name, gradient in zip(gates, gradients, strict=True):
                    found[name] += gradient.double().square().sum(0).cpu() / len(segments)
                stage.advance(len(some))
        return found

    def readings(self, structures: Mapping[str, Structure], segments: Tensor, interface: Interface) -> float:
        return 3  # forward, and back through what each product read


@contextmanager
def _gated(
    model: PreTrainedModel, architecture: Architecture, structures: Mapping[str, Structure], num_segments: int
) -> Iterator[dict[str, Tensor]]:
    """While this lasts every structure of every segment is multiplied by a gate, which is one: {matrix: (segments, structures)}."""
    gates: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, structure in structures.items():
            gates[name] = torch.ones(num_segments, structure.num, device=model.device, requires_grad=True)
            module = model.get_submodule(architecture.hook_path(structure.reader) or "")
            hooks.callback(module.register_forward_pre_hook(_gate(gates[name], structure.size)).remove)
        yield gates


def _gate(gate: Tensor, size: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Some classes hand over all tokens in one row.
        x = args[0].reshape(len(gate), -1, args[0].shape[-1])
        return ((x * gate.repeat_interleave(size, 1)[:, None]).view_as(args[0]), *args[1:])

    return multiply


IMPORTANCE = Taylor("taylor", repairs=False)
REPAIRED = Taylor("taylor_repaired", repairs=True)
