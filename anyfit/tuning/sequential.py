"""Solving a chosen configuration again, in the order in which the network runs.

Variants are made with the inputs that the original network gives each matrix, so that any of them can stand
beside any other. Once the configuration is chosen, the inputs that really arrive are known: those which the
matrices before, as they are stored, produce. Each group of matrices is encoded anew for them, and its target
moves to what makes good the errors that arrive: with x̃ the original's inputs and x the arriving ones,

    W* = W C (H + λ)⁻¹,   C = E[x̃ xᵀ],   H = E[x xᵀ]

is the least-squares solution of W* x ≈ W x̃. It asks the same as GPTAQ (arXiv 2504.02692), in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.units import Weight
from anyfit.progress import Progress

DAMPING = 0.05
"""Of the mean diagonal, in the least-squares target."""
SHARE = 1.0
"""Of the way from the original matrix to its least-squares target."""

Encode = Callable[[Sequence[Weight], Sequence[Tensor], InputStatistics], Sequence[Tensor]]
"""Matrices that read one input, their targets (outputs, inputs) and the statistics of what arrives, to the matrices as stored."""


@torch.inference_mode()
def resolve(
    stored: PreTrainedModel,
    original: PreTrainedModel,
    architecture: Architecture,
    weights: Sequence[Weight],
    tokens: Tensor,
    encode: Encode,
    *,
    share: float = SHARE,
    batch_size: int = 8,
    progress: Progress,
) -> None:
    """Encode all matrices of the blocks anew, one input after the other, and put them into `stored` in place.

    `stored` runs as the configuration does now; matrices outside the blocks stay. `tokens` (segments, length).
    Memory: the hidden states of all tokens, twice.
    """
    stream = _Stream(stored, original, architecture, tokens, batch_size)
    inside = [weight for weight in weights if weight.block is not None]
    with progress.stage("solve in order", len(inside)) as stage:
        for block, members in groupby(inside, key=lambda weight: weight.block):
            assert block is not None
            for _, group in groupby(members, key=lambda weight: weight.input):
                matrices = list(group)
                statistics, crossed = stream.moments(block, architecture, matrices[0])
                targets = [_target(_matrix(original, weight), statistics, crossed, share) for weight in matrices]
                for weight, value in zip(matrices, encode(matrices, targets, statistics), strict=True):
                    stored.get_parameter(weight.name).copy_(value.T if weight.transposed else value)
                    stage.advance(detail=weight.name)
            stream.advance(block)


def _matrix(model: PreTrainedModel, weight: Weight) -> Tensor:
    matrix = model.get_parameter(weight.name).float()
    return matrix.T if weight.transposed else matrix


def _target(matrix: Tensor, statistics: InputStatistics, crossed: Tensor, share: float) -> Tensor:
    """The matrix, moved by `share` towards the least-squares answer to what arrives."""
    hessian = statistics.hessian.double()
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    # C + λ in place of C: the same damping on both sides pulls towards the original matrix, not towards zero.
    pulled = crossed + (damped - hessian)
    answer = torch.cholesky_solve(pulled.T, torch.linalg.cholesky(damped)).T
    return torch.lerp(matrix, (matrix.double() @ answer).float(), share)


class _Stream:
    """Hidden states of both networks before the next block, batch by batch."""

    def __init__(
        self, stored: PreTrainedModel, original: PreTrainedModel, architecture: Architecture, tokens: Tensor, batch_size: int
    ) -> None:
        self._networks = (stored, original)
        self._paths = [architecture.block.format(i=i) for i in range(architecture.num_blocks(original))]
        batches = tokens.to(original.device).split(batch_size)
        self._hidden = tuple([_first_input(network, self._paths[0], batch) for batch in batches] for network in self._networks)
        # What blocks are given besides depends on the shape of the batch alone: masks, positions.
        self._given = {len(batch): _arguments(original, self._paths, batch) for batch in (batches[0], batches[-1])}

    def moments(self, block: int, architecture: Architecture, weight: Weight) -> tuple[InputStatistics, Tensor]:
        """Second moments of what arrives at the weight, and E[x̃ xᵀ] (columns, columns) float64."""
        columns = weight.shape[1]
        where = self._networks[0].device
        own, crossed = (torch.zeros(columns, columns, dtype=torch.float64, device=where) for _ in range(2))
        path = architecture.hook_path(weight)
        assert path is not None
        count = 0
        for batch in range(len(self._hidden[0])):
            x, x_original = (self._input(which, block, batch, path).reshape(-1, columns).float() for which in range(2))
            own += (x.T @ x).double()
            crossed += (x_original.T @ x).double()
            count += len(x)
        return InputStatistics((own / count).float(), count), crossed / count

    def advance(self, block: int) -> None:
        """Both streams to behind the block."""
        for which, hidden in enumerate(self._hidden):
            for batch in range(len(hidden)):
                hidden[batch] = self._run(which, block, batch)

    def _input(self, which: int, block: int, batch: int, path: str) -> Tensor:
        """What arrives at a module of the block, which runs no further."""
        return _caught(self._networks[which], path, lambda: self._run(which, block, batch))

    def _run(self, which: int, block: int, batch: int) -> Tensor:
        hidden = self._hidden[which][batch]
        args, kwargs = self._given[len(hidden)][block]
        output = self._networks[which].get_submodule(self._paths[block])(hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]


class _StopRunning(Exception):  # noqa: N818  (no error: enough has run)
    """Enough of the network has run."""


def _first_input(network: PreTrainedModel, path: str, batch: Tensor) -> Tensor:
    """The hidden states before the first block."""
    return _caught(network, path, lambda: network(input_ids=batch, use_cache=False))


def _caught(network: PreTrainedModel, path: str, run: Callable[[], object]) -> Tensor:
    """What a module is given when the network is `run`, which then stops."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _StopRunning

    caught: list[Tensor] = []
    handle = network.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _StopRunning:
        return caught[0]
    finally:
        handle.remove()
    raise AssertionError(f"{path} is not run")


def _arguments(network: PreTrainedModel, paths: list[str], batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each block is given besides the hidden states."""

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handles = [network.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True) for path in paths]
    try:
        network(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
