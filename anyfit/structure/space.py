"""What may be pruned, and what each size costs: counted on the network's skeleton as it is once cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.architectures.coverage import passthrough
from anyfit.checkpoint import Source
from anyfit.core.budget import LATENCY, MACS
from anyfit.core.config import HEADS, Config
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.modeling_cut import ATTENTION, FEED_FORWARD
from anyfit.structure.cutting import Kept, cut, sizes
from anyfit.structure.levels import READERS, Structure, first, kept_of


@dataclass(frozen=True)
class Measured:
    """Latencies of one runtime on one device as budgets count them, in milliseconds: `of` an attention or a feed-forward with so many
    structures kept in a format, and `rest`, of everything else in a format."""

    of: Callable[[Structure, int, str], float]
    rest: Callable[[str], float]


@dataclass(frozen=True)
class Storage:
    """How a target stores what is left. `bytes_`: what a tensor, by name and shape, adds to the file in a format, all in all and by its
    numbers alone. `refuses`: why a matrix can't be in a format; None where it can. `fixed_bytes`: what belongs to no tensor."""

    dense: str
    """The format of everything that isn't quantised."""
    bytes_: Callable[[str, torch.Size, str], tuple[int, int]]
    refuses: Callable[[str, torch.Size, str], str | None]
    fixed_bytes: int
    instead: Callable[[Structure], int] = lambda _: 0
    """Bytes of what a runtime must have in the place of an attention or a feed-forward that is left out whole."""


def structures(model: PreTrainedModel, architecture: Architecture, weights: Iterable[Weight]) -> dict[str, Structure]:
    """Everything that can be made smaller, by the name of the matrix that reads it. Raises `ModelError` where anyfit doesn't know where
    heads and channels are."""
    weights, found, whole = list(weights), {}, sizes(model, architecture)
    halves = {HEADS: {"q", "k", "v", "qkv"}}
    for weight in weights:
        if weight.block is None or weight.role not in READERS:
            continue
        own, axis = whole[weight.block], READERS[weight.role]
        num, size = (own.groups, own.heads * own.head_dim) if axis == HEADS else (own.channels, 1)
        assert num * size == weight.shape[1], weight
        roles = halves.get(axis, {"gate", "up", "gate_up"})
        rest = tuple(other for other in weights if other.block == weight.block and other.role in roles)
        found[weight.name] = Structure(axis, weight, num, size, rest)
    return found


@dataclass(frozen=True)
class Pruning:
    """What a space of structures is made of. `weights`: all matrices that may be decided about; `formats`: those that each may have, the
    storage's dense one first; `outside`: whether what isn't in the blocks is decided about, too; `length`: tokens of a sequence, and
    `causal`: whether each sees only those before it, for the multiply-adds of attention."""

    source: Source
    architecture: Architecture
    structures: Mapping[str, Structure]
    weights: Sequence[Weight]
    formats: Sequence[str]
    outside: bool
    length: int
    causal: bool
    measured: Measured | None

    def space(self, storage: Storage) -> Space:
        """Each attention and feed-forward at its sizes, in its formats; what stands outside in its formats.

        Sizes that take no less time than a larger one in the same format aren't offered, in the dense format in none: smaller must be
        faster.
        """
        assert self.formats[0] == storage.dense, self.formats
        whole = self.source.skeleton()
        halves = {name: _parameters(whole, self.architecture, structure) for name, structure in self.structures.items()}
        at_level = self._cut(halves)
        inside = {name for half in halves.values() for name in half}
        decided = [weight for weight in self.weights if weight.block is None and self.outside]
        carrying = max(decided, key=lambda weight: weight.input == "head", default=None)  # an encoder of texts has no head
        fixed = {name: t.shape for name, t in _stored(whole).items() if name not in inside and name not in {w.name for w in decided}}
        added = [storage.bytes_(name, shape, storage.dense) for name, shape in fixed.items()]
        latency = {} if self.measured is None else {LATENCY: 0.0 if decided else self.measured.rest(storage.dense)}
        return Space(
            decisions=(
                *(self._module(structure, at_level[name], storage) for name, structure in self.structures.items()),
                *(self._outside(weight, storage, carries=weight is carrying) for weight in decided),
            ),
            fixed_bytes=storage.fixed_bytes + sum(size for size, _ in added),
            fixed_stored_bytes=sum(size for _, size in added),
            num_parameters=sum(tensor.numel() for tensor in _stored(whole).values()),
            others={MACS: float(sum(w.num_weights for w in self.weights if w.block is None and w.input is not None)), **latency},
        )

    def _cut(self, halves: Mapping[str, set[str]]) -> dict[str, dict[int, dict[str, torch.Size]]]:
        """Shapes of what is left of each attention and feed-forward, by the number of structures kept."""
        ladders = {name: structure.levels() for name, structure in self.structures.items()}
        num_blocks = self.architecture.num_blocks(self.source.skeleton())
        found: dict[str, dict[int, dict[str, torch.Size]]] = {name: {} for name in ladders}
        for rung in range(max(map(len, ladders.values()))):
            chosen = {name: ladder[rung] for name, ladder in ladders.items() if rung < len(ladder)}
            kept = {name: torch.arange(number) for name, number in chosen.items()}
            stored = _stored(cut(self.source.skeleton(), self.architecture, kept_of_blocks(self.structures, kept, num_blocks)))
            for name, number in chosen.items():
                found[name][number] = {key: stored[key].shape for key in halves[name] if key in stored}
        return found

    def _module(self, structure: Structure, at_level: Mapping[int, Mapping[str, torch.Size]], storage: Storage) -> Decision:
        choices: list[Choice] = []
        refused: dict[str, str] = {}
        matrices = {weight.name for weight in structure.weights}
        offered = dict(at_level)
        for format_ in self.formats:
            fastest = float("inf")
            for kept, shapes in at_level.items():
                name = structure.choice(kept, format_)
                if kept not in offered:
                    refused[name] = f"its size isn't offered in {storage.dense}"
                    continue
                why = next((why for key in matrices & shapes.keys() if (why := storage.refuses(key, shapes[key], format_))), None)
                if not matrices & shapes.keys() and format_ != storage.dense:
                    continue  # nothing that could be quantised
                latency = self.measured.of(structure, kept, format_) if self.measured and not why else None
                # What is left out whole may take as long as the smallest does: nothing.
                if latency is not None and (latency >= fastest if kept else latency > fastest):
                    why = "it takes no less time than one that keeps more"
                if why:
                    refused[name] = why
                    if format_ == storage.dense:
                        del offered[kept]
                    continue
                fastest = fastest if latency is None else latency
                added = [storage.bytes_(key, shape, format_ if key in matrices else storage.dense) for key, shape in shapes.items()]
                others = {MACS: self._macs(structure, kept, shapes)} | ({} if latency is None else {LATENCY: latency})
                plain = kept == structure.num or format_ == storage.dense
                extra = 0 if kept else storage.instead(structure)
                choices.append(Choice(name, extra + sum(size for size, _ in added), extra + sum(size for _, size in added), others, plain))
        return Decision(Unit(structure.reader.name, structure.weights), tuple(choices), structure.axis, refused)

    def _outside(self, weight: Weight, storage: Storage, *, carries: bool) -> Decision:
        """The embedding or the head. The one that `carries`: whatever else takes time is counted with it."""
        choices, refused, shape = [], {}, torch.Size(weight.shape)
        for format_ in self.formats:
            if why := storage.refuses(weight.name, shape, format_):
                refused[format_] = why
                continue
            size, stored = storage.bytes_(weight.name, shape, format_)
            latency = {} if self.measured is None else {LATENCY: self.measured.rest(format_) if carries else 0.0}
            choices.append(Choice(format_, size, stored, {MACS: 0.0, **latency}))
        return Decision(Unit(weight.name, (weight,)), tuple(choices), refused=refused)

    def _macs(self, structure: Structure, kept: int, shapes: Mapping[str, torch.Size]) -> float:
        macs = sum(shape.numel() for shape in shapes.values() if len(shape) == 2)
        if structure.axis == HEADS:  # each query with the keys that it sees, then the values; in a decoder those before it, half of them
            macs += (1 if self.causal else 2) * self.length * kept * structure.size
        return float(macs)


def kept_of_blocks(found: Mapping[str, Structure], kept: Mapping[str, Tensor], num_blocks: int) -> list[Kept]:
    """What is kept of every block, given the structures kept of each matrix that reads them, by its name, rising."""
    blocks: list[dict[str, Tensor]] = [{} for _ in range(num_blocks)]
    for name, indices in kept.items():
        structure = found[name]
        assert structure.reader.block is not None
        blocks[structure.reader.block]["groups" if structure.axis == HEADS else "channels"] = indices
    return [Kept(**block) for block in blocks]


def kept_structures(found: Mapping[str, Structure], config: Config, order: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The structures that a config keeps, by the name of the matrix that reads them. `order`: of those of a matrix, kept longest first."""
    numbers = {name: kept_of(config[name, structure.axis]) for name, structure in found.items()}
    return {name: first(order(name), number) for name, number in numbers.items() if number is not None}


def _parameters(model: PreTrainedModel, architecture: Architecture, structure: Structure) -> set[str]:
    """Names of what belongs to an attention or a feed-forward, norms of its own too."""
    layout, index = architecture.layout, structure.reader.block
    assert layout is not None and index is not None
    block = architecture.block.format(i=index)
    module = layout.attention if structure.axis == HEADS else layout.feed_forward
    half = ATTENTION if structure.axis == HEADS else FEED_FORWARD
    paths = [weight.name.removesuffix(".weight") for weight in structure.weights] + ([] if module is None else [f"{block}.{module}"])
    paths += [f"{block}.{norms[half]}" for norms in (layout.norms, layout.norms_after) if half in norms]
    return {name for name in _stored(model) if any(name.startswith(f"{path}.") for path in paths)}


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor that a file holds, once, under its first name."""
    return passthrough(model, ())[0]
