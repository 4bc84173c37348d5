"""Estimated sensitivity: the Fisher information of a unit's outputs, from one backward pass.

To second order the divergence that an output error d of one matrix causes is ½ dᵀ F d, with F the mean of
g gᵀ over labels drawn from the network's own distribution and g the gradient of their log-likelihood by the
outputs. With F taken as isotropic, the sensitivity is ½ mean |g|² / outputs. A table that is looked up has
no product to hook; such units are measured as in `anyfit.scores.kl`.

The pass goes back block after block, each run again from its inputs, so that its time grows with the number of blocks
and its memory doesn't.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anyfit.core.space import Decision
from anyfit.elastic.stream import ElasticStream
from anyfit.progress import Progress, Stage
from anyfit.scores.base import Errors, Sensitivity, disturbance
from anyfit.streaming import POSITIONS_AT_ONCE, States, Stream, batches
from anyfit.tasks.language import Reference


class Fisher(Sensitivity):
    name = "fisher"

    def measure(self, elastic: ElasticStream, tokens: Tensor, errors: Errors, progress: Progress) -> dict[str, float]:
        stream, decisions = elastic.stream, elastic.space.decisions
        trace = stream.trace(tokens, elastic.original)
        looked_up = [d for d in decisions if any(w.role == "embedding" for w in d.unit.weights)]
        found = {}
        if looked_up:
            reference = Reference.of(stream.predictions(tokens, elastic.original, trace[-1]), tokens)
            found = {d.unit.name: disturbance(elastic, d, trace, reference, errors[d.unit.name]) for d in looked_up}
        products = [d for d in decisions if d not in looked_up]
        with _squares(stream, products) as totals, progress.stage("score", stream.num_blocks + 1) as stage:
            _backward(stream, tokens, trace, stage)
        num_predictions = tokens[:, 1:].numel()
        return found | {name: 0.5 * total / num_predictions for name, total in totals.items()}


def _backward(stream: Stream, tokens: Tensor, trace: list[States], stage: Stage) -> None:
    """Of the log-likelihood of drawn labels, through the whole network. Uses up the trace."""
    gradients = _from_labels(stream, tokens, trace.pop())
    stage.advance(detail="head")
    for index in reversed(range(stream.num_blocks)):
        states = trace.pop()
        with stream.block(index, stream.original) as run, torch.enable_grad():
            for segments in batches(tokens):
                hidden = states.read(segments).requires_grad_()
                run(tokens[segments], hidden).backward(gradients.read(segments))
                assert hidden.grad is not None
                gradients.write(segments, hidden.grad)
        stage.advance(detail=f"block {index}")
    if stream.architecture.before:
        with stream.embedding(stream.original) as embed, torch.enable_grad():
            for segments in batches(tokens):
                embed(tokens[segments]).backward(gradients.read(segments))


def _from_labels(stream: Stream, tokens: Tensor, final: States) -> States:
    """The gradients by the last block's outputs."""
    generator = torch.Generator().manual_seed(0)
    gradients = stream.states(final.length, final.width)
    with stream.head(stream.original) as run, torch.enable_grad():
        for place in range(len(tokens)):
            segment = slice(place, place + 1)
            hidden = final.read(segment)
            parts = []
            for some in hidden[:, :-1].split(POSITIONS_AT_ONCE, 1):
                some = some.clone().requires_grad_()
                logits = run(some)[0].float()
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
                parts.append(some.grad)
            gradients.write(segment, torch.cat([*parts, torch.zeros_like(hidden[:, -1:])], 1))
    return gradients


@contextmanager
def _squares(stream: Stream, decisions: list[Decision]) -> Iterator[dict[str, float]]:
    """While the block lasts: the summed squares of the gradients by each unit's outputs, over the number of outputs."""
    totals = {decision.unit.name: 0.0 for decision in decisions}
    handles = []
    for decision in decisions:
        for weight in decision.unit.weights:
            module = stream.model.get_submodule(weight.name.removesuffix(".weight"))
            handles.append(module.register_forward_hook(_hook(totals, decision.unit.name, weight.shape[0])))
    try:
        yield totals
    finally:
        for handle in handles:
            handle.remove()


def _hook(totals: dict[str, float], name: str, outputs: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            totals[name] += float(gradient.float().square().sum()) / outputs

        if output.requires_grad:
            output.register_hook(add)

    return observe


SENSITIVITY = Fisher()
