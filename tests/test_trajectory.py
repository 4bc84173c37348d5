"""OPTIN's importance against running every cut network by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.importance.trajectory import MANIFOLD_SHARE, TEMPERATURE, Trajectory, trajectories
from anyfit.progress import Silent
from anyfit.structure.cutting import Kept, cut, sizes
from anyfit.testing.models import tiny_model

TOKENS = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(0))


def scored(model: PreTrainedModel, together: int = 128) -> list[Trajectory]:
    return trajectories(model, architecture_of(model), TOKENS, channels_together=together, progress=Silent())


def seen(model: PreTrainedModel) -> tuple[list[Tensor], Tensor]:
    """Gram matrices of the blocks' outputs, and predictions, by the network's own means."""
    with torch.no_grad():
        output = model(TOKENS, output_hidden_states=True)
        states: list[Tensor] = []
        path = architecture_of(model).block.removesuffix(".{i}")
        hook = model.get_submodule(path)[-1].register_forward_hook(lambda module, args, result: states.append(result))
        model(TOKENS)
        hook.remove()
    outputs = [*output.hidden_states[1:-1], *states]
    normalised = [torch.nn.functional.normalize(state.flatten(0, 1), dim=-1) for state in outputs]
    return [state @ state.T for state in normalised], (output.logits / TEMPERATURE).log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "phi3", "gemma2"])
def test_scores_are_those_of_the_networks_that_were_really_cut(kind: str, same_random_state: None) -> None:
    model = tiny_model(kind, num_hidden_layers=3)
    architecture = architecture_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = scored(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    whole = sizes(model, architecture)
    grams, predictions = seen(model)
    manifold, divergence, scores = [], [], []
    for block in range(3):
        for what, number, width in (("groups", whole[block].groups, 1), ("channels", 4, 128)):
            for index in range(number):
                stay = torch.tensor([other for other in range(number * width) if other // width != index])
                kept = [Kept(), Kept(), Kept()]
                kept[block] = Kept(**{what: stay})
                other_grams, others = seen(cut(copy.deepcopy(model), architecture, kept))
                first = min(block + 1, 2)
                manifold.append(sum(float((a - b).square().sum()) for a, b in zip(grams[first:], other_grams[first:], strict=True)))
                divergence.append(TEMPERATURE**2 * float((predictions.exp() * (predictions - others)).sum(-1).mean()))
                scores.append(float(getattr(found[block], what)[index]) * (2 if block == 2 else 1))
    factor = sum(manifold) / (MANIFOLD_SHARE * sum(divergence))
    expected = torch.tensor(manifold) + factor * torch.tensor(divergence)
    assert torch.allclose(torch.tensor(scores), expected, rtol=2e-2, atol=1e-4 * float(expected.max()))


def test_nothing_is_lost_with_what_is_zero_and_no_place_is_preferred() -> None:
    model = tiny_model("llama")
    down = model.get_submodule("model.layers.0.mlp.down_proj").weight
    down.data[:, 128:256] = 0
    before = scored(model)
    assert before[0].channels[1] < 1e-9 < before[0].channels[[0, 2, 3]].min() / 1e3
    order = torch.tensor([2, 3, 0, 1])
    columns = (order[:, None] * 128 + torch.arange(128)).flatten()
    down.data = down.data[:, columns]
    for name in ("gate_proj", "up_proj"):
        weight = model.get_submodule(f"model.layers.0.mlp.{name}").weight
        weight.data = weight.data[columns]
    after = scored(model)
    assert torch.allclose(after[0].channels, before[0].channels[order], rtol=1e-3, atol=1e-9)
    assert torch.allclose(after[1].groups, before[1].groups, rtol=1e-3)


def test_halves_that_were_removed_have_no_structures() -> None:
    model = tiny_model("llama")
    nothing = torch.arange(0)
    cut(model, architecture_of(model), [Kept(groups=nothing), Kept(channels=nothing)])
    first, second = scored(model)
    assert (len(first.groups), len(first.channels), len(second.groups), len(second.channels)) == (0, 4, 2, 0)
