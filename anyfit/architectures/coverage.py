"""What a description leaves alone, so that nothing is skipped silently and everything is written."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.architectures.base import is_matrix
from anyfit.core.units import Weight


def passthrough(model: PreTrainedModel, weights: Iterable[Weight]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything stored that is not decided, and the ties: ({name: tensor}, {other name: name stored}).

    Norms, biases, tables of positions and stored buffers, as they are. With the decided weights they are the
    whole `state_dict`. The tensors share memory with the model.
    """
    stored = {id(model.get_parameter(weight.name)): weight.name for weight in weights}
    decided = set(stored.values())
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = stored.setdefault(id(tensor), name)
        if first != name:
            tied[name] = first
        elif name not in decided:
            kept[name] = tensor.detach()
    return kept, tied


def uncovered(model: PreTrainedModel, weights: Iterable[Weight]) -> dict[str, str]:
    """Every parameter of two or more dimensions that is no decided weight, with the reason; ties count as decided."""
    kept, _ = passthrough(model, weights)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in kept and parameter.ndim >= 2}
    return {name: _reason(model.get_submodule(name.rpartition(".")[0]), parameter) for name, parameter in parameters.items()}


def _reason(owner: nn.Module, parameter: Tensor) -> str:
    kind = type(owner).__name__
    if isinstance(owner, nn.Embedding):
        return "a table whose rows are looked up and added"
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "the kernel of a convolution"
    if is_matrix(owner):
        return "a projection that the description of this kind doesn't name"
    if parameter.ndim == 3:
        return f"a stack of {parameter.shape[0]} matrices in one parameter of {kind} (experts, for example)"
    return f"a parameter of {kind}, which is not a Linear layer"
