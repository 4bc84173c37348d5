"""What may be pruned, and what each size costs: counted on the network's skeleton as it is once cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.architectures.coverage import passthrough
from anyfit.checkpoint import Source
from anyfit.core.budget import LATENCY, MACS
from anyfit.core.config import HEADS, WIDTH, Config
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.structure.cutting import Kept, cut, sizes
from anyfit.structure.levels import Structure, kept_of

Latencies = Callable[[Structure, int], float]
"""Milliseconds that an attention or a feed-forward takes with so many structures kept."""
Bytes = Callable[[str, torch.Size], tuple[int, int]]
"""What a tensor, by name and shape, adds to the written file: all in all, and by its numbers alone."""


@dataclass(frozen=True)
class Measured:
    """Latencies of one runtime on one device: `of` each attention and feed-forward, and the `rest` of the network, in milliseconds."""

    of: Latencies
    rest: float


def structures(model: PreTrainedModel, architecture: Architecture, weights: Iterable[Weight]) -> dict[str, Structure]:
    """Everything that can be made smaller, by the name of the matrix that reads it. Raises `ModelError` where anyfit doesn't know where
    heads and channels are."""
    found, whole = {}, sizes(model, architecture)
    for weight in weights:
        if weight.block is not None and weight.role in ("o", "down"):
            own = whole[weight.block]
            attention = weight.role == "o"
            axis, num, size = (HEADS, own.groups, own.heads * own.head_dim) if attention else (WIDTH, own.channels, 1)
            assert num * size == weight.shape[1], weight
            found[weight.name] = Structure(axis, weight, num, size)
    return found


def pruned_space(
    source: Source,
    architecture: Architecture,
    found: Mapping[str, Structure],
    *,
    length: int,
    bytes_: Bytes,
    fixed_bytes: int = 0,
    measured: Measured | None,
) -> Space:
    """Each attention and feed-forward at its sizes.

    `length`: tokens of a sequence, for the multiply-adds of attention. `fixed_bytes`: of
    the file, that belong to no tensor. Sizes that take no less time than a larger one aren't offered: narrower must be faster.
    """
    levels = {name: list(structure.levels().items()) for name, structure in found.items()}
    whole = source.skeleton()
    halves = {name: _parameters(whole, architecture, structure) for name, structure in found.items()}
    rest = {name: p for name, p in _stored(whole).items() if not any(name in half for half in halves.values())}
    choices: dict[str, list[Choice]] = {name: [] for name in found}
    for row in zip_longest(*levels.values()):
        model = source.skeleton()
        chosen = {name: level for name, level in zip(levels, row, strict=True) if level is not None}
        first = {name: torch.arange(kept) for name, (_, kept) in chosen.items()}
        cut(model, architecture, kept_of_blocks(found, first, architecture.num_blocks(whole)))
        parameters = _stored(model)
        for name, (choice, kept) in chosen.items():
            own = {key: parameters[key] for key in halves[name] if key in parameters}
            choices[name].append(_choice(choice, own, found[name], kept, length, bytes_, measured))
    added = [bytes_(name, parameter.shape) for name, parameter in rest.items()]
    others = {MACS: float(_head_macs(whole, architecture))} | ({LATENCY: measured.rest} if measured else {})
    return Space(
        decisions=tuple(_decision(structure, choices[name]) for name, structure in found.items()),
        fixed_bytes=fixed_bytes + sum(size for size, _ in added),
        fixed_stored_bytes=sum(size for _, size in added),
        num_parameters=sum(tensor.numel() for tensor in _stored(whole).values()),
        others=others,
    )


def kept_of_blocks(found: Mapping[str, Structure], kept: Mapping[str, Tensor], num_blocks: int) -> list[Kept]:
    """What is kept of every block, given the structures kept of each matrix that reads them, by its name."""
    blocks: list[dict[str, Tensor]] = [{} for _ in range(num_blocks)]
    for name, indices in kept.items():
        structure = found[name]
        assert structure.reader.block is not None
        blocks[structure.reader.block]["groups" if structure.axis == HEADS else "channels"] = indices.sort().values
    return [Kept(**block) for block in blocks]


def kept_structures(found: Mapping[str, Structure], config: Config, order: Callable[[str], Tensor], num_blocks: int) -> list[Kept]:
    """What a config keeps of every block. `order`: of a matrix's structures, those that are kept longest first."""
    chosen = {name: kept_of(config[name, structure.axis]) for name, structure in found.items()}
    return kept_of_blocks(found, {name: order(name)[:kept] for name, kept in chosen.items()}, num_blocks)


def _decision(structure: Structure, choices: Sequence[Choice]) -> Decision:
    """Those of the choices, the largest first, that take less of everything than all before."""
    kept, refused = list(choices[:1]), {}
    for choice in choices[1:]:
        if LATENCY in choice.others and choice.others[LATENCY] >= kept[-1].others[LATENCY]:
            refused[choice.name] = f"it takes no less time than {kept[-1].name}, which keeps more"
        else:
            kept.append(choice)
    return Decision(Unit(structure.reader.name, (structure.reader,)), tuple(kept), structure.axis, refused)


def _choice(
    name: str,
    parameters: Mapping[str, Tensor],
    structure: Structure,
    kept: int,
    length: int,
    bytes_: Bytes,
    measured: Measured | None,
) -> Choice:
    added = [bytes_(key, parameter.shape) for key, parameter in parameters.items()]
    macs = sum(parameter.numel() for parameter in parameters.values() if parameter.dim() == 2)
    if structure.axis == HEADS:  # each query with the keys before it, then the values: half of the square, twice
        macs += length * kept * structure.size
    others = {MACS: float(macs)} | ({LATENCY: measured.of(structure, kept)} if measured else {})
    return Choice(name, sum(size for size, _ in added), sum(size for _, size in added), others)


def _parameters(model: PreTrainedModel, architecture: Architecture, structure: Structure) -> set[str]:
    """Names of what belongs to an attention or a feed-forward."""
    layout, index = architecture.layout, structure.reader.block
    assert layout is not None and index is not None
    block = architecture.block.format(i=index)
    paths = {role: path for _, group in architecture.groups(index) for role, path in group.items()}
    if structure.axis == HEADS:
        prefixes = [layout.attention]
    else:
        own = [paths[role] for role in ("gate", "up", "gate_up", "down") if role in paths]
        prefixes = [layout.feed_forward] if layout.feed_forward else own
    return {name for name in _stored(model) if any(name.startswith(f"{block}.{prefix}.") for prefix in prefixes)}


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor that a file holds, once, under its first name."""
    return passthrough(model, ())[0]


def _head_macs(model: PreTrainedModel, architecture: Architecture) -> int:
    """Multiply-adds a token of what is not in the blocks: the head, tied or not."""
    return model.get_submodule(architecture.head).weight.numel() if architecture.head else 0
