"""Structures by how far the network's later states and its predictions move without them: no training, no gradients.

Paper: "The Need for Speed: Pruning Transformers with One Recipe" (OPTIN), arXiv 2403.17921, section 3. Structure u of block i is set to
zero and the network run on from there. With f the outputs of a block, normalised token by token, the manifold loss of the block is
‖f fᵀ - f' f'ᵀ‖²; the importance is its sum over the blocks after i (for the last block, its own) and a weighted KL divergence of
the predictions at temperature 4.

Of pictures f has a row for each, its state at one position, and f fᵀ is the mean over positions: the loss is about how pictures lie to
each other. That is the patch form, for vision alone, in the authors' code, of which the rest of the vision part wasn't released.

Differences from the paper, and why:

* One weight serves all structures: it makes the sum of the divergences a tenth of the sum of the manifold losses. The authors' code
  takes a power of ten anew for each structure, from those scored before it, so that scores depend on the order.
* Their code multiplies scores by a factor of the structure's index, which favours low ones. Not here: no structure is preferred
  for its place.
* A structure is a whole KV group, or some channels that lie side by side, and several are run as one batch.
* Their factor of one half for all heads is left out: heads and channels are ordered separately.
* The paper also removes tokens of pictures. Not here: all positions stay in every block.
* An encoder of texts predicts nothing: its manifold losses alone count, of tokens that aren't padding.
* 32 pictures are read, where the settings that were released, for text, read 128 samples: each structure takes a run with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.core.config import HEADS, WIDTH
from anyfit.importance.base import NetworkImportance
from anyfit.interface import LANGUAGE, PICTURES, TEXTS, Interface, interface_of, present
from anyfit.progress import Progress
from anyfit.structure.cutting import sizes
from anyfit.structure.levels import STEP, Structure

SAMPLED_TOKENS = 768
TEMPERATURE = 4.0
MANIFOLD_SHARE = 10
"""Times the divergences' sum that the manifold losses' sum is."""
LAST_BLOCK = 0.5
"""Factor of the last block's scores, which see no later block."""
NUM_TOKENS, NUM_PICTURES = 1024, 32
"""Of the text, or of the pictures, that are read without each structure."""
MOST_RUNS = 4096
"""Channels, above which neighbours are removed together."""
_TOKENS_TOGETHER = 4096


@dataclass(frozen=True)
class Trajectory:
    """Importance of the structures of one block, float64, comparable between the blocks of a network: `groups` (KV groups,), `channels`
    (channels / those taken together,)."""

    groups: Tensor
    channels: Tensor


@torch.no_grad()
def trajectories(
    model: PreTrainedModel, architecture: Architecture, segments: Tensor, *, channels_together: int, progress: Progress
) -> list[Trajectory]:
    """Of every block. `segments`: as the network's interface reads them. The model is in memory, whole, in evaluation mode, and isn't
    changed.

    Takes one run of the rest of the network for each structure. Raises `ModelError` where anyfit doesn't know where heads and channels
    are.
    """
    network = _Network(model, architecture, segments)
    found: list[tuple[Tensor, Tensor]] = []
    with progress.stage("importance", 2 * len(network.blocks)) as stage:
        for index, own in enumerate(sizes(model, architecture)):
            assert own.channels % channels_together == 0, (own, channels_together)
            for role, number in (("o", own.groups), ("down", own.channels // channels_together)):
                found.append(network.losses(index, role, number))
                stage.advance(detail=f"block {index}")
    manifold, divergence = (float(torch.cat(parts).sum()) for parts in zip(*found, strict=True))
    factor = manifold / (MANIFOLD_SHARE * divergence) if divergence else 0.0
    # A picture that is alone lies to no other: its manifold losses are rounding errors.
    scores = [other if network.alone else own + factor * other for own, other in found]
    scores[-2:] = [LAST_BLOCK * own for own in scores[-2:]]
    return [Trajectory(*pair) for pair in zip(scores[::2], scores[1::2], strict=True)]


class Trajectories(NetworkImportance):
    """As many neighbouring channels are removed together as keep the number of runs within `MOST_RUNS`, at most a step of widths; they
    share their score."""

    name, repairs = "trajectory", False
    reads = (LANGUAGE, TEXTS, PICTURES)

    def scores(
        self, model: PreTrainedModel, architecture: Architecture, structures: Mapping[str, Structure], segments: Tensor, progress: Progress
    ) -> dict[str, Tensor]:
        together, some = num_together(structures), segments[: _num_read(interface_of(model.config), segments)]
        found = trajectories(model, architecture, some, channels_together=together, progress=progress)
        scores = {}
        for name, structure in structures.items():
            assert structure.reader.block is not None
            own = found[structure.reader.block]
            scores[name] = own.groups if structure.axis == HEADS else own.channels.repeat_interleave(together) / together
        return scores

    def readings(self, structures: Mapping[str, Structure], segments: Tensor, interface: Interface) -> float:
        together = num_together(structures)
        runs = sum(structure.num if structure.axis == HEADS else structure.num // together for structure in structures.values())
        share = _num_read(interface, segments) / len(segments)
        return runs / 2 * share  # from a structure's block on: half of the network, on average


def _num_read(interface: Interface, segments: Tensor) -> int:
    return min(len(segments), NUM_PICTURES if interface is PICTURES else max(1, NUM_TOKENS // segments.shape[1]))


def num_together(structures: Mapping[str, Structure]) -> int:
    """Neighbouring channels that are removed together."""
    channels = [structure.num for structure in structures.values() if structure.axis == WIDTH]
    together = 1
    while 2 * together <= STEP and sum(channels) > together * MOST_RUNS and all(number % (2 * together) == 0 for number in channels):
        together *= 2
    return together


class _Network:
    """The intact network's states, and how far others are from them."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture, segments: Tensor) -> None:
        self.model, self.architecture, self.segments = model, architecture, segments.to(model.device)
        self.interface = interface_of(model.config)
        self.alone = self.interface is PICTURES and len(segments) == 1
        self.blocks = [model.get_submodule(architecture.block.format(i=i)) for i in range(architecture.num_blocks(model))]
        self.inputs: list[Tensor] = []
        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(self._remember, with_kwargs=True).remove)
            outputs, logits = self._run(0, 1)
        self.positions = outputs[0].shape[:-1].numel()
        order = torch.randperm(self.positions, generator=torch.Generator().manual_seed(0))
        if self.interface is TEXTS:
            order = order[present(segments.cpu()).flatten()[order]]
        self.sampled = order[:SAMPLED_TOKENS].sort().values.to(model.device)
        self.grams = [self._grams(output, 1) for output in outputs]
        self.predictions = None if self.interface is TEXTS else _at_temperature(logits)

    def losses(self, index: int, role: str, number: int) -> tuple[Tensor, Tensor]:
        """(manifold losses, divergences) without each of the `number` structures that the output projection `role` of a block reads."""
        if not number:
            return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
        together = max(1, _TOKENS_TOGETHER // self.positions)
        parts = [self._without(index, role, number, some) for some in torch.arange(number).split(together)]
        manifold, divergence = zip(*parts, strict=True)
        return torch.cat(manifold), torch.cat(divergence)

    def _without(self, index: int, role: str, number: int, removed: Tensor) -> tuple[Tensor, Tensor]:
        path = next(paths[role] for _, paths in self.architecture.groups(index) if role in paths)
        kept = torch.ones(len(removed), number, device=self.model.device)
        kept[torch.arange(len(removed)), removed] = 0

        def remove(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].unflatten(0, (len(removed), -1))
            mask = kept.repeat_interleave(x.shape[-1] // number, dim=1)
            return ((x * mask.view(len(removed), *[1] * (x.ndim - 2), -1)).flatten(0, 1),)

        with ExitStack() as hooks:
            hooks.callback(self.blocks[index].get_submodule(path).register_forward_pre_hook(remove).remove)
            outputs, logits = self._run(index, len(removed))
        first = min(index + 1, len(self.blocks) - 1)
        manifold = torch.zeros(len(removed), dtype=torch.float64)
        for intact, output in zip(self.grams[first:], outputs[first - index :], strict=True):
            manifold += (self._grams(output, len(removed)) - intact).square().sum((1, 2), dtype=torch.float64).cpu()
        if self.predictions is None:
            return manifold, torch.zeros_like(manifold)
        predictions = _at_temperature(logits).unflatten(0, (len(removed), -1))
        further = self.predictions - predictions
        # Probabilities add up to one, so that this is Σ p further; rounding of what is the same is squared here.
        divergence = (self.predictions.exp() * (further + torch.expm1(-further))).sum(-1, dtype=torch.float64)
        return manifold, TEMPERATURE**2 * divergence.flatten(1).mean(1).clamp_min(0).cpu()

    def _run(self, first: int, copies: int) -> tuple[list[Tensor], Tensor]:
        """The outputs of the blocks from the `first` on, and what comes out, of so many copies of what is read side by side."""
        outputs: list[Tensor] = []

        def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden = self.inputs[first].repeat(copies, 1, 1)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            outputs.append(output)

        with ExitStack() as hooks:
            for block in self.blocks[:first]:
                hooks.enter_context(_passing(block))
            for block in self.blocks[first:]:
                hooks.callback(block.register_forward_hook(keep).remove)
            if first < len(self.inputs):
                hooks.callback(self.blocks[first].register_forward_pre_hook(start, with_kwargs=True).remove)
            logits = self.interface(self.model, self.segments.repeat(copies, *[1] * (self.segments.ndim - 1)))
        return outputs, logits

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append(args[0] if args else kwargs["hidden_states"])

    def _grams(self, output: Tensor, copies: int) -> Tensor:
        """Cosines of states: between the sampled tokens, (copies, tokens, tokens); between pictures, (copies, pictures, pictures), means
        over positions."""
        states = functional.normalize(output.float(), dim=-1)
        if self.interface is PICTURES:
            states = states.flatten(1).unflatten(0, (copies, -1))  # a product of these rows sums up over positions
            return states @ states.mT / output.shape[1]
        states = states.flatten(0, 1).unflatten(0, (copies, -1))[:, self.sampled]
        return states @ states.mT


@contextmanager
def _passing(block: nn.Module) -> Iterator[None]:
    """While this lasts the block hands on what it gets."""
    forward = block.forward

    def hand_on(*args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    block.forward = hand_on
    try:
        yield
    finally:
        block.forward = forward


def _at_temperature(logits: Tensor) -> Tensor:
    """Logarithms of the predictions."""
    return (logits.float() / TEMPERATURE).log_softmax(-1)


IMPORTANCE = Trajectories()
