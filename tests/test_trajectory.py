"""OPTIN's importance against running every cut network by itself."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.importance.trajectory import LAST_BLOCK, MANIFOLD_SHARE, TEMPERATURE, Trajectory, _Network, trajectories
from anyfit.interface import PADDING, PICTURES, TEXTS, interface_of, present
from anyfit.progress import Silent
from anyfit.structure.cutting import Kept, cut, sizes
from anyfit.testing.models import tiny_model

TOKENS = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(0))
SENTENCES = torch.where(torch.arange(20) < torch.tensor([[20], [7]]), TOKENS, PADDING)
PHOTOGRAPHS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def read_by(model: PreTrainedModel) -> Tensor:
    return {PICTURES: PHOTOGRAPHS, TEXTS: SENTENCES}.get(interface_of(model.config), TOKENS)


def scored(model: PreTrainedModel, together: int = 128) -> list[Trajectory]:
    return trajectories(model, architecture_of(model), read_by(model), channels_together=together, progress=Silent())


def seen(model: PreTrainedModel) -> tuple[list[Tensor], Tensor]:
    """Relations of the blocks' outputs, and predictions, by the network's own means."""
    interface, read = interface_of(model.config), read_by(model)
    with torch.no_grad():
        output = model(**interface.tensors(read), output_hidden_states=True)
        states: list[Tensor] = []
        path = architecture_of(model).block.removesuffix(".{i}")
        hook = model.get_submodule(path)[-1].register_forward_hook(lambda module, args, result: states.append(result))
        model(**interface.tensors(read))
        hook.remove()
    found = [*output.hidden_states[1:-1], *states]
    if interface is TEXTS:
        return [between_tokens(state[present(read)][None]) for state in found], torch.zeros(1, 1)
    related = between_pictures if interface is PICTURES else between_tokens
    return [related(state) for state in found], (output.logits / TEMPERATURE).log_softmax(-1)


def between_tokens(states: Tensor) -> Tensor:
    normalised = torch.nn.functional.normalize(states.flatten(0, 1), dim=-1)
    return normalised @ normalised.T


def between_pictures(states: Tensor) -> Tensor:
    """By definition: of each pair of pictures the mean, over positions, of the cosine of their states there."""
    number, length = states.shape[:2]
    found = torch.zeros(number, number)
    for one, other, position in itertools.product(range(number), range(number), range(length)):
        a, b = states[one, position], states[other, position]
        found[one, other] += a @ b / (a.norm() * b.norm()) / length
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox", "phi3", "gemma2", "vit", "bert"])
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
    factor = sum(manifold) / (MANIFOLD_SHARE * sum(divergence)) if any(divergence) else 0.0
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


def test_a_head_of_pictures_that_is_zero_costs_nothing_and_no_head_is_preferred() -> None:
    model = tiny_model("vit")
    attention, size = model.get_submodule("vit.layers.0.attention"), 64
    attention.o_proj.weight.data[:, size : 2 * size] = 0
    before = scored(model)
    assert before[0].groups[1] < 1e-9 < before[0].groups[[0, 2, 3]].min() / 1e3
    order = torch.tensor([2, 3, 0, 1])
    rows = (order[:, None] * size + torch.arange(size)).flatten()
    attention.o_proj.weight.data = attention.o_proj.weight.data[:, rows]
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = attention.get_submodule(name)
        projection.weight.data, projection.bias.data = projection.weight.data[rows], projection.bias.data[rows]
    after = scored(model)
    assert torch.allclose(after[0].groups, before[0].groups[order], rtol=1e-3, atol=1e-9)
    assert torch.allclose(after[0].channels, before[0].channels, rtol=1e-3)
    assert torch.allclose(after[1].groups, before[1].groups, rtol=1e-3)


@torch.no_grad()
def test_of_one_picture_predictions_alone_are_compared() -> None:
    """It lies to no other picture, so that its manifold losses are rounding errors, which would order structures otherwise."""
    model, picture = tiny_model("vit"), PHOTOGRAPHS[:1]
    network = _Network(model, architecture_of(model), picture)
    found = trajectories(model, architecture_of(model), picture, channels_together=128, progress=Silent())
    for index, factor in enumerate((1.0, LAST_BLOCK)):
        for role, own in (("o", found[index].groups), ("down", found[index].channels)):
            assert torch.equal(own, factor * network.losses(index, role, len(own))[1]) and (own > 0).all()


def test_halves_that_were_removed_have_no_structures() -> None:
    model = tiny_model("llama")
    nothing = torch.arange(0)
    cut(model, architecture_of(model), [Kept(groups=nothing), Kept(channels=nothing)])
    first, second = scored(model)
    assert (len(first.groups), len(first.channels), len(second.groups), len(second.channels)) == (0, 4, 2, 0)
