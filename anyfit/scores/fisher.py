"""Estimated sensitivity: the Fisher information of a unit's outputs, from one backward pass.

To second order the divergence that an output error d of one matrix causes is ½ dᵀ F d, with F the mean of
g gᵀ over labels drawn from the network's own distribution and g the gradient of their log-likelihood by the
outputs. With F taken as isotropic, the sensitivity is ½ mean |g|² / outputs. A table that is looked up has
no product to hook; such units are measured as in `anyfit.scores.kl`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from anyfit.core.space import Decision
from anyfit.elastic.model import ElasticModel
from anyfit.progress import Progress
from anyfit.scores.base import Errors, Sensitivity, probe
from anyfit.tasks.language import Reference, kl

BATCH = 4


class Fisher(Sensitivity):
    name = "fisher"

    def measure(self, elastic: ElasticModel, reference: Reference, errors: Errors, progress: Progress) -> dict[str, float]:
        products = [d for d in elastic.space.decisions if all(w.role != "embedding" for w in d.unit.weights)]
        squares = _output_gradients(elastic, products, reference.tokens, progress)
        found = {}
        for decision in elastic.space.decisions:
            name = decision.unit.name
            if name in squares:
                found[name] = squares[name]
                continue
            choice = probe(errors[name])
            with elastic.disturbed(decision, choice) as model:
                found[name] = kl(model, reference) / max(errors[name][choice], 1e-300)
        return found


def _output_gradients(elastic: ElasticModel, decisions: list[Decision], tokens: Tensor, progress: Progress) -> dict[str, float]:
    """½ mean squared gradient per output, by unit."""
    totals = {decision.unit.name: 0.0 for decision in decisions}
    handles = []
    for decision in decisions:
        for weight in decision.unit.weights:
            module = elastic.model.get_submodule(weight.name.removesuffix(".weight"))
            handles.append(module.register_forward_hook(_hook(totals, decision.unit.name, weight.shape[0])))
    generator = torch.Generator().manual_seed(0)
    embedding = elastic.model.get_input_embeddings()
    # Weights take no gradients; the graph starts at the embedded tokens.
    handles.append(embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_()))
    predicted = 0
    try:
        with progress.stage("fisher", len(tokens)) as stage, torch.enable_grad():
            for batch in tokens.split(BATCH):
                logits = elastic.model(input_ids=batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
                predicted += len(labels)
                stage.advance(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    return {name: 0.5 * total / predicted for name, total in totals.items()}


def _hook(totals: dict[str, float], name: str, outputs: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            totals[name] += float(gradient.float().square().sum()) / outputs

        output.register_hook(add)

    return observe


SENSITIVITY = Fisher()
