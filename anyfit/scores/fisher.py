"""Estimated sensitivity: the Fisher information of a unit's outputs, from one backward pass.

To second order the divergence that an output error d of one matrix causes is ½ dᵀ F d, with F the mean of
g gᵀ over labels drawn from the network's own distribution and g the gradient of their log-likelihood by the
outputs; of what has no labels, over directions that are drawn (`tasks.base.Task.pull`). With F taken as
isotropic, the sensitivity is ½ mean |g|² / outputs. A table that is looked up has no product to hook; such
units are measured as in `anyfit.scores.kl`.

The pass goes back block after block, each run again from its inputs, so that its time grows with the number of blocks
and its memory doesn't.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anyfit.core.space import Decision
from anyfit.devices import repeatable
from anyfit.elastic.stream import ElasticStream
from anyfit.progress import Progress, Stage
from anyfit.scores.base import Errors, Sensitivity, disturbance
from anyfit.streaming import States, Stream, batches
from anyfit.tasks import task_of


class Fisher(Sensitivity):
    name = "fisher"

    def measure(self, elastic: ElasticStream, tokens: Tensor, errors: Errors, progress: Progress) -> dict[str, float]:
        decisions, group = elastic.space.decisions, elastic.group
        looked_up = [d for d in decisions if any(w.role == "embedding" for w in d.unit.weights)]
        found = {d.unit.name: _disturbed(elastic, d, tokens, errors) for i, d in enumerate(looked_up) if group.owns(i)}
        found = {name: value for part in group.gathered(found) for name, value in part.items()}
        return found | information(elastic, [d for d in decisions if d not in looked_up], tokens, progress)


def information(elastic: ElasticStream, products: Sequence[Decision], tokens: Tensor, progress: Progress) -> dict[str, float]:
    """The sensitivity of units whose outputs are products, by unit name; text (segments, length)."""
    group = elastic.group
    stream = elastic.stream
    with _squares(stream, products) as squares, repeatable(stream.device), progress.stage("backward pass", stream.num_blocks + 1) as stage:
        _backward(elastic.stream, tokens, group.share(batches(tokens)), stage)
    found: dict[str, list[float]] = {decision.unit.name: [] for decision in products}
    for name, square in (row for part in group.gathered(squares) for row in part):
        found[name].append(square)
    # Exact sums are the same in any order.
    return {name: 0.5 * math.fsum(own) / task_of(stream.model.config).num_answers(tokens) for name, own in found.items()}


def _disturbed(elastic: ElasticStream, decision: Decision, tokens: Tensor, errors: Errors) -> float:
    """As in `anyfit.scores.kl`, of a unit whose place is before the first block."""
    reference = task_of(elastic.stream.model.config).reference(elastic.stream.predictions(tokens, elastic.original), tokens)
    return disturbance(elastic, decision, tokens, [], reference, errors[decision.unit.name])


def _backward(stream: Stream, tokens: Tensor, share: Sequence[slice], stage: Stage) -> None:
    """Of what is drawn, through the whole network, for some segments of the text."""
    if not share:
        return
    first, tokens = share[0].start, tokens[share[0].start : share[-1].stop]
    trace = stream.trace(tokens, stream.original)
    gradients = _pulled(stream, tokens, trace.pop(), first)
    stage.advance(detail="head")
    for index in reversed(range(stream.num_blocks)):
        states = trace.pop()
        with stream.block(index, stream.original) as run, torch.enable_grad():
            for segments in batches(tokens):
                hidden = states.read(segments).requires_grad_()
                output = run(tokens[segments], hidden)
                output.backward(gradients.read(segments).to(output.device))
                assert hidden.grad is not None
                gradients.write(segments, hidden.grad)
        stage.advance(detail=f"block {index}")
    if stream.architecture.before:
        with stream.embedding(stream.original) as embed, torch.enable_grad():
            for segments in batches(tokens):
                embedded = embed(tokens[segments])
                embedded.backward(gradients.read(segments).to(embedded.device))


def _pulled(stream: Stream, tokens: Tensor, final: States, first: int) -> States:
    """The gradients by the last block's outputs. Each segment, the first of which is number `first`, is drawn for by itself."""
    gradients, task = stream.states(final.length, final.width), task_of(stream.model.config)
    with stream.head(stream.original) as run, torch.enable_grad():
        for place in range(len(tokens)):
            segment = slice(place, place + 1)
            gradients.write(segment, task.pull(run, final.read(segment), tokens[segment], first + place))
    return gradients


@contextmanager
def _squares(stream: Stream, decisions: Sequence[Decision]) -> Iterator[list[tuple[str, float]]]:
    """While the block lasts: (unit, summed squares of the gradients by its outputs, over their number), one for each product."""
    found: list[tuple[str, float]] = []
    handles = []
    for decision in decisions:
        for weight in decision.unit.weights:
            module = stream.model.get_submodule(weight.name.removesuffix(".weight"))
            handles.append(module.register_forward_hook(_hook(found, decision.unit.name, weight.shape[0])))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hook(found: list[tuple[str, float]], name: str, outputs: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            found.append((name, float(gradient.float().square().sum()) / outputs))

        if output.requires_grad:
            output.register_hook(add)

    return observe


SENSITIVITY = Fisher()
