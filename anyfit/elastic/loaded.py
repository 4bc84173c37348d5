"""A network in memory, made block by block; of several processes each holds a part of every block."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.distributed import Group
from anyfit.streaming import Numbers, Stored


def loaded(stored: Stored, architecture: Architecture, numbers: Numbers, group: Group, without: Collection[str] = ()) -> PreTrainedModel:
    """The network with these numbers, in float32 and on the CPU, ready to run by all processes of the `group` together.

    A block is shared out before the next one is read, so that no process ever holds more of them than its part and one. `without`:
    parameters that stay empty, for someone to put something else in their place.
    """
    model = stored.frame()
    decided = {name: weight for weight in architecture.weights(stored.skeleton()) for name in (weight.name, *weight.tied)}
    shared: dict[str, nn.Parameter] = {}  # the frame's own parameters are not tied

    def fill(module: nn.Module, prefix: str = "") -> None:
        for name in [f"{prefix}{name}" for name, _ in module.named_parameters()]:
            if name in without or not model.get_parameter(name).is_meta:
                continue
            weight = decided.get(name)
            tensor = weight.name if weight else name
            if tensor not in shared:
                shared[tensor] = nn.Parameter(_own(numbers.matrix(weight) if weight else stored.read(name)), requires_grad=False)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, shared[tensor] if weight and weight.tied else shared.pop(tensor))

    for index in range(architecture.num_blocks(model)):
        path = architecture.block.format(i=index)
        fill(model.get_submodule(path), f"{path}.")
        group.shard(model.get_submodule(path))
    fill(model)
    present = stored.tensors()
    for name, buffer in model.named_buffers():
        if name in present:
            buffer.copy_(stored.read(name))
    return model


def _own(values: Tensor) -> Tensor:
    """In float32, and not in a file: what is mapped would stay in memory for as long as it is looked at."""
    return values.to(torch.float32, copy=True)
