"""What must hold of the description of any kind of network: run each of `CHECKS` on a small model of the kind.

>>> from anyfit.architectures.llama import LLAMA
>>> from anyfit.testing.models import tiny_model
>>> for check in CHECKS:
...     check(LLAMA, tiny_model("llama"))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.architectures.coverage import passthrough, uncovered
from anyfit.core.units import Weight
from anyfit.interface import LANGUAGE, PADDING, interface_of
from anyfit.modeling_cut import Sizes
from anyfit.structure.cutting import Kept, cut, sizes


def check_each_weight_is_owned_once(architecture: Architecture, model: PreTrainedModel) -> None:
    """Every parameter is one decided weight, another name of one, or kept; a kept matrix has a reason."""
    weights = list(architecture.weights(model))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[str, str] = {}
    for weight in weights:
        for name in (weight.name, *weight.tied):
            assert name not in owners, f"{name} belongs to both {owners[name]} and {weight.name}"
            assert parameters[name] is parameters[weight.name], f"{name} is not tied to {weight.name}"
            owners[name] = weight.name
    kept, tied = passthrough(model, weights)
    assert not owners.keys() & kept.keys(), f"decided and kept: {sorted(owners.keys() & kept.keys())}"
    lost = parameters.keys() - owners.keys() - kept.keys() - tied.keys()
    assert not lost, f"neither decided nor kept: {sorted(lost)}"
    reasons = uncovered(model, weights)
    silent = {name for name in kept if name in parameters and parameters[name].ndim >= 2 and not reasons.get(name)}
    assert not silent, f"kept without a reason: {sorted(silent)}"


def check_shapes_are_of_the_product(architecture: Architecture, model: PreTrainedModel) -> None:
    """As (outputs, inputs), each matrix times what its module reads is what its module returns."""
    calls = _calls(architecture, model)
    for weight, path in _multiplied(architecture, model):
        matrix = _matrix(model.get_parameter(weight.name), weight)
        assert tuple(matrix.shape) == weight.shape, f"{weight.name} is {tuple(matrix.shape)}, described as {weight.shape}"
        bias = getattr(model.get_submodule(path), "bias", None)
        product = functional.linear(calls[path].numbers, matrix, bias)
        assert torch.allclose(product, calls[path].returned, atol=1e-4), f"{weight.name} is not what {path} multiplies"


def check_inputs_are_shared_as_described(architecture: Architecture, model: PreTrainedModel) -> None:
    """Matrices with one `input` read one tensor, and those with different ones read different numbers."""
    calls = _calls(architecture, model)
    first: dict[str, _Call] = {}
    for weight, path in _multiplied(architecture, model):
        assert path in calls, f"{path} never ran"
        call = first.setdefault(str(weight.input), calls[path])
        same = call.read is calls[path].read and torch.equal(call.numbers, calls[path].numbers)
        assert same, f"{weight.name} doesn't read {weight.input}"
    for (name, one), (other, two) in combinations(first.items(), 2):
        assert not torch.equal(one.numbers, two.numbers), f"{name} and {other} are the same numbers"


def check_order_is_of_execution(architecture: Architecture, model: PreTrainedModel) -> None:
    """Inputs come in the order in which the network reads them; a tied embedding counts as the first."""
    inputs = {path: weight.input for weight, path in _multiplied(architecture, model)}
    order = list(dict.fromkeys(weight.input for weight, _ in _multiplied(architecture, model) if weight.role != "embedding"))
    executed = list(dict.fromkeys(inputs[path] for path in _calls(architecture, model) if inputs[path] in order))
    assert order == executed, f"described {order}, executed {executed}"
    blocks = {weight.block for weight in architecture.weights(model)} - {None}
    assert blocks == set(range(architecture.num_blocks(model))), f"blocks {blocks} of {architecture.num_blocks(model)}"


def check_rebuilt_is_the_original(architecture: Architecture, model: PreTrainedModel) -> None:
    """Decided and kept tensors, put into a fresh network of the kind, give the original's outputs bit for bit."""
    weights = list(architecture.weights(model))
    kept, tied = passthrough(model, weights)
    tensors = {name: tensor.clone() for name, tensor in kept.items()}
    for weight in weights:
        matrix = _matrix(model.get_parameter(weight.name), weight).detach().clone()
        tensors[weight.name] = matrix.T if weight.transposed else matrix
    with torch.random.fork_rng(devices=[]):
        rebuilt = type(model)(copy.deepcopy(model.config)).eval()
    for parameter in rebuilt.parameters():
        parameter.data.fill_(torch.nan)
    missing, unexpected = rebuilt.load_state_dict(tensors, strict=False)
    assert set(missing) == tied.keys() and not unexpected, f"missing {missing}, ties {sorted(tied)}, unexpected {unexpected}"
    tokens = _tokens(model)
    with torch.no_grad():
        interface = interface_of(model.config)
        assert torch.equal(interface(rebuilt, tokens), interface(model, tokens)), "the outputs differ"


def check_meta_gives_the_same(architecture: Architecture, model: PreTrainedModel) -> None:
    """A skeleton on meta is described with the same names, shapes and ties."""
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    assert list(architecture.weights(skeleton)) == list(architecture.weights(model)), "differs on meta"
    assert passthrough(skeleton, architecture.weights(skeleton))[1] == passthrough(model, architecture.weights(model))[1], "ties differ"


def check_cut_is_the_original_with_zeros(architecture: Architecture, model: PreTrainedModel) -> None:
    """Cut in any way, the network gives what it gives with zeros in the removed columns, and writes the same text with its cache.

    Nothing to check where nobody said where heads and channels are.
    """
    if architecture.layout is None:
        return
    tokens, generator = _tokens(model), torch.Generator().manual_seed(1)
    whole = sizes(model, architecture)
    for removed in (None, "groups", "channels"):  # in the first block, of which transformers asks how far the cache is
        kept = [Kept(_some(own.groups, generator), _some(own.channels, generator)) for own in whole]
        if removed is not None:
            kept[0] = replace(kept[0], **{removed: torch.arange(0)})
        smaller, zeroed = cut(copy.deepcopy(model), architecture, kept), copy.deepcopy(model)
        _zero(zeroed, architecture, kept, whole)
        found = [(own.groups, own.channels) for own in sizes(smaller, architecture)]
        wanted = [(len(own.groups), len(own.channels)) for own in kept if own.groups is not None and own.channels is not None]
        assert found == wanted, f"sizes {found} where {wanted} were kept"
        with torch.no_grad():
            interface = interface_of(model.config)
            difference = (interface(smaller, tokens) - interface(zeroed, tokens)).abs().max()
        assert difference <= 1e-5, f"{difference} from the network with zeros; removed from the first block: {removed}"
        if interface is not LANGUAGE:
            continue
        asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        slowly = smaller.generate(tokens, use_cache=False, **asked)
        for implementation in ("dynamic", "static"):
            quickly = smaller.generate(tokens, cache_implementation=implementation, disable_compile=True, **asked)
            assert torch.equal(quickly, slowly), f"a {implementation} cache changes the text; removed from the first block: {removed}"


def _some(number: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(number, generator=generator)[: (number + 1) // 2].sort().values


def _zero(model: PreTrainedModel, architecture: Architecture, kept: Sequence[Kept], whole: Sequence[Sizes]) -> None:
    """Put zeros where `cut` removes columns of the output projections."""
    for weight in architecture.weights(model):
        if weight.block is None or weight.role not in ("o", "down"):
            continue
        of_groups, own = weight.role == "o", whole[weight.block]
        stay = kept[weight.block].groups if of_groups else kept[weight.block].channels
        assert stay is not None
        mask = torch.zeros(own.groups if of_groups else own.channels, dtype=torch.bool)
        mask[stay] = True
        columns = mask.repeat_interleave(weight.shape[1] // len(mask))
        _matrix(model.get_parameter(weight.name).data, weight)[:, ~columns] = 0


CHECKS: tuple[Callable[[Architecture, PreTrainedModel], None], ...] = (
    check_each_weight_is_owned_once,
    check_shapes_are_of_the_product,
    check_inputs_are_shared_as_described,
    check_order_is_of_execution,
    check_rebuilt_is_the_original,
    check_meta_gives_the_same,
    check_cut_is_the_original_with_zeros,
)


def _multiplied(architecture: Architecture, model: PreTrainedModel) -> list[tuple[Weight, str]]:
    paths = ((weight, architecture.hook_path(weight)) for weight in architecture.weights(model))
    return [(weight, path) for weight, path in paths if path is not None]


def _matrix(parameter: Tensor, weight: Weight) -> Tensor:
    return parameter.T if weight.transposed else parameter


def _tokens(model: PreTrainedModel) -> Tensor:
    """Where texts may have padding, some have."""
    if not interface_of(model.config).words:
        return interface_of(model.config).example(model.config, 2, 0)
    tokens = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    if interface_of(model.config) is not LANGUAGE:
        tokens[1, 17:] = PADDING
    return tokens


class _Call(NamedTuple):
    """What a module read (the very tensor, and its numbers at that moment) and what it returned."""

    read: Tensor
    numbers: Tensor
    returned: Tensor


def _calls(architecture: Architecture, model: PreTrainedModel) -> dict[str, _Call]:
    """{path: its first call} of every module that a decided weight is multiplied in, in the order of a forward pass."""
    calls: dict[str, _Call] = {}

    def remember(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if path not in calls:
                calls[path] = _Call(args[0], args[0].clone(), output.clone())

        return hook

    paths = [path for _, path in _multiplied(architecture, model)]
    handles = [model.get_submodule(path).register_forward_hook(remember(path)) for path in paths]
    try:
        with torch.no_grad():
            interface_of(model.config)(model, _tokens(model))
    finally:
        for handle in handles:
            handle.remove()
    return calls
