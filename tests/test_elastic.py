"""What every storage of an elastic network has to do, and codebooks as one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from anyfit.core.config import Config
from anyfit.core.space import Choice, Decision
from anyfit.core.units import Unit, Weight
from anyfit.elastic.base import Elastic
from anyfit.elastic.linear import ElasticNetwork
from anyfit.elastic.nested import NestedNetwork
from anyfit.formats import formats
from anyfit.formats.aqlm import AdditiveFormat
from anyfit.progress import Silent
from anyfit.tasks.language import Reference, kl
from anyfit.testing.counting import Operations
from anyfit.testing.models import tiny_model
from anyfit.testing.quantizers import rounded
from anyfit.trainers import loop, samplers
from anyfit.trainers.decoupled import Decoupled
from anyfit.trainers.losses import Divergence
from anyfit.tuning.coded import Stored, repacked

PATHS = ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj")
DECOUPLED = {
    "offsets": ("int4_offset", "int2_offset"),
    "factors": ("Q4_0", "int3_sym"),
    "codebooks": ("aqlm_2x8g8", "aqlm_1x8g8"),
    "codebooks and offsets": ("int4_offset", "aqlm_1x8g8"),
}
NESTED = ("8", "4", "2")
Extract = Callable[[Mapping[tuple[str, str], str]], nn.Module]


def decoupled(names: tuple[str, ...]) -> tuple[ElasticNetwork, dict[str, dict[str, Stored]]]:
    """A tiny Llama, two matrices of which are elastic, and what is stored of them."""
    model, matrices, about = tiny_model("llama"), dict[str, dict[str, Stored]](), []
    for path in PATHS:
        values = model.get_parameter(f"{path}.weight").detach()
        weight = Weight(f"{path}.weight", (values.shape[0], values.shape[1]), "up", path, int(path.split(".")[2]))
        matrices[path] = {name: rounded(weight, name, values) for name in names}
        sizes = {name: formats.get(name).bytes_(weight.shape) for name in names}
        about.append(Decision(Unit(path, (weight,)), tuple(Choice(name, size, size) for name, size in sizes.items())))
    return ElasticNetwork(model, about, matrices, 4, 0), matrices


def moved(values: Iterator[nn.Parameter]) -> None:
    """As if training had done something."""
    generator = Generator().manual_seed(1)
    for value in values:
        value.data.add_(torch.randn(value.shape, generator=generator) * 0.02)


@pytest.fixture(params=[*DECOUPLED, "nested"])
def subject(request: pytest.FixtureRequest) -> tuple[Elastic[Any], Extract]:
    """A network that was trained and settled, and what makes an ordinary one out of what is stored of it."""
    if request.param == "nested":
        nested = NestedNetwork(tiny_model("llama"), PATHS, [int(bits) for bits in NESTED], 32)
        moved(iter(nested.factors().values()))
        nested.settle()
        return nested, lambda config: nested.extracted(tiny_model("llama"), config)
    network, matrices = decoupled(DECOUPLED[request.param])
    moved(value for variant in network.variants().values() for value in variant.trained())
    data = {}
    for (path, name), variant in network.variants().items():
        entry, parts = matrices[path][name], variant.merged()
        assert parts and not torch.equal(variant.values, entry.values())
        data[path, name] = Stored(entry.weight, entry.format_, repacked(entry.format_, entry.data, parts), entry.order)
        variant.settle(parts)
        assert not variant.trained()

    @torch.no_grad()
    def extracted(config: Mapping[tuple[str, str], str]) -> nn.Module:
        plain = tiny_model("llama")
        for path in PATHS:
            plain.get_parameter(f"{path}.weight").copy_(data[path, config[path, "format"]].values())
        return plain

    return network, extracted


def configs(network: Elastic[Any]) -> list[Config]:
    first, second = ([choice.name for choice in decision.choices] for decision in network.decisions)
    return [Config.of_formats(dict(zip(PATHS, names, strict=True))) for names in [*zip(first, second, strict=True), (first[0], second[-1])]]


@torch.no_grad()
def test_a_config_runs_as_the_extracted_model(subject: tuple[Elastic[Any], Extract]) -> None:
    network, extracted = subject
    tokens = torch.randint(64, (2, 12), generator=Generator().manual_seed(0))
    seen = list[Tensor]()
    for config in configs(network):
        plain, logits = extracted(config), network.set(config)(input_ids=tokens).logits
        assert torch.equal(logits, plain(input_ids=tokens).logits), config.chosen
        for path in PATHS:
            assert torch.equal(network.layers[path].matrix, plain.get_parameter(f"{path}.weight"))
        assert not any(torch.equal(logits, other) for other in seen)
        seen.append(logits)


def test_setting_computes_nothing(subject: tuple[Elastic[Any], Extract]) -> None:
    network, _ = subject
    with Operations() as counted:
        torch.zeros(1)
        for config in configs(network):
            network.set(config)
    assert counted.number == 1


def test_codebooks_are_trained_with_everything_else() -> None:
    """At each size both lose less, and codes stay."""
    network, matrices = decoupled(DECOUPLED["codebooks and offsets"])
    text = Reference.of(tiny_model("llama"), torch.randint(64, (8, 24), generator=Generator().manual_seed(0)))
    before = [kl(network.set(config), text) for config in configs(network)]
    settings = loop.Settings(num_steps=40, batch_size=4, rate=1e-2, rank=4)
    sampler = samplers.get("uniform")(network.decisions, 20)
    subject = Decoupled(network, Divergence(network.model, text))
    loop.train(subject, sampler, settings, checkpoint={}, keep=lambda _: None, progress=Silent())
    for (path, name), variant in network.variants().items():
        entry, parts = matrices[path][name], variant.merged()
        if isinstance(entry.format_, AdditiveFormat):
            old, new = (entry.format_.read(data) for data in (entry.data, repacked(entry.format_, entry.data, parts)))
            assert torch.equal(old.codes, new.codes)
            assert not torch.equal(old.codebooks, new.codebooks) and not torch.equal(old.scales, new.scales)
        variant.settle(parts)
    after = [kl(network.set(config), text) for config in configs(network)]
    assert all(now < 0.9 * then for now, then in zip(after, before, strict=True)), (before, after)
