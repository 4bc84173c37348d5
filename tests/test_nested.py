"""Nested storage: one stored tensor of integers, smaller sizes by an integer operation, trained together."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

import anyfit
import anyfit.api
from anyfit import finalists, pipeline, training
from anyfit.core.config import Config
from anyfit.core.errors import UserError
from anyfit.elastic.nested import NestedNetwork
from anyfit.family.store import Store
from anyfit.formats import formats
from anyfit.formats.base import GridFormat
from anyfit.formats.nested import bounds, integers_of, lowered, nested_bits, packed, switched
from anyfit.progress import Silent
from anyfit.quantizers import double_rounding
from anyfit.recipes import recipes
from anyfit.scores.table import Table
from anyfit.testing.models import save_tiny, tiny_text
from anyfit.trainers import loop
from anyfit.trainers.bit_switching import BitSwitching, ladder
from anyfit.trainers.losses import MicroBatch, Objective, Outputs
from anyfit.trainers.sampling import EverySize, HessianAware

SIZES = (8, 6, 4, 2)
MIXED = Config.of_formats({"first": "8", "second": "2"})


@given(code=st.integers(-128, 127), low=st.integers(2, 8))
def test_switching_is_rounding_with_halves_upwards(code: int, low: int) -> None:
    step = 2 ** (8 - low)
    rounded = (2 * code + step) // (2 * step)  # floor(code / step + 1/2)
    expected = min(max(rounded, -(2 ** (low - 1))), 2 ** (low - 1) - 1)
    assert int(switched(torch.tensor([code], dtype=torch.int8), 8, low)) == expected


def test_how_often_two_roundings_differ_from_one() -> None:
    """Figures for normal weights in a range of three standard deviations."""
    weight = torch.randn(400_000, generator=Generator().manual_seed(0))
    scale = torch.tensor([3 / 127])
    stored = double_rounding.integers(weight, scale, 8)
    for low, share in ((6, 0.123), (4, 0.031), (3, 0.015), (2, 0.0075)):
        once = (weight / (scale * 2 ** (8 - low))).round().clamp(*bounds(low))
        different = (once != switched(stored, 8, low)).float().mean()
        assert different == pytest.approx(share, rel=0.1), low


@pytest.mark.parametrize("low", [8, 6, 4, 3, 2])
def test_gradients_are_those_of_rounding_that_is_looked_through(low: int) -> None:
    """Against autograd on an expression in which rounding adds a constant."""
    generator = Generator().manual_seed(low)
    weight, upstream = (torch.randn(300, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([0.02], dtype=torch.float64)
    given_weight, given_scale = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    double_rounding.rounded_twice(given_weight, given_scale, 8, low).backward(upstream)
    own_weight, own_scale = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    ratio = (own_weight / own_scale).clamp(-128, 127)
    codes = switched(double_rounding.integers(weight, scale, 8), 8, low).double()
    seen = ratio / 2 ** (8 - low)
    ((seen + (codes - seen).detach()) * own_scale * 2 ** (8 - low)).backward(upstream)
    assert all(one.grad is not None for one in (given_weight, given_scale, own_weight, own_scale))
    inside = (weight / scale >= -128) & (weight / scale <= 127)
    assert 0.5 < inside.double().mean() < 1
    assert torch.equal(given_weight.grad, upstream * inside)
    assert torch.allclose(given_weight.grad, own_weight.grad) and torch.allclose(given_scale.grad, own_scale.grad, rtol=1e-9)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, some: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(some)).relu()).relu().mean((2, 3)))


@pytest.fixture
def pictures() -> tuple[Pictures, Tensor, Tensor]:
    generator = Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Pictures()
    some = torch.randn(64, 3, 6, 6, generator=generator)
    return model, some, (some.mean((1, 2, 3)) > 0).long() + 2 * (some.std((1, 2, 3)) > 1).long()


class Labels(Objective):
    def __init__(self, model: nn.Module, some: Tensor, labels: Tensor) -> None:
        self.model, self.some, self.labels, self.num_samples = model, some, labels, len(some)

    def outputs(self, batch: MicroBatch) -> Outputs:
        return Outputs(self.model(self.some[batch.samples]))

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits, self.labels[batch.samples])


def trained(network: NestedNetwork, some: Tensor, labels: Tensor, steps: int, **more: object) -> NestedNetwork:
    network.model.train()
    settings = loop.Settings(num_steps=steps, batch_size=16, micro_batch=16, rate=1e-2, together=False)
    rest = {"checkpoint": {}, "keep": lambda _: None, "progress": Silent()} | more
    subject = BitSwitching(network, Labels(network.model, some, labels))
    loop.train(subject, EverySize(network.decisions, 1), settings, **rest)  # type: ignore[arg-type]
    network.model.eval()
    return network


def at(network: NestedNetwork, bits: int) -> nn.Module:
    """The network at one size everywhere."""
    return network.set(training.uniform(network.decisions, str(bits)))


def test_stored_integers_give_the_very_outputs_of_training(pictures: tuple[Pictures, Tensor, Tensor]) -> None:
    model, some, labels = pictures
    network = trained(NestedNetwork(model, ("first", "second"), SIZES), some, labels, 5)
    assert all(entry.integers.dtype == torch.int8 for entry in network.stored().values())
    with torch.no_grad():
        for config in (*(training.uniform(network.decisions, str(bits)) for bits in SIZES), MIXED):
            extracted = network.extracted(Pictures(), config)
            assert type(extracted) is Pictures and set(extracted.state_dict()) == set(Pictures().state_dict())
            assert torch.equal(extracted(some), network.set(config)(some)), config
    assert len({float(at(network, bits)(some).sum()) for bits in SIZES}) == len(SIZES)


def test_each_size_learns_and_has_norms_of_its_own(pictures: tuple[Pictures, Tensor, Tensor]) -> None:
    model, some, labels = pictures
    network = NestedNetwork(model, ("first", "second"), SIZES)

    def losses() -> list[float]:
        network.model.eval()
        with torch.no_grad():
            return [float(nn.functional.cross_entropy(at(network, bits)(some), labels)) for bits in SIZES]

    before = losses()
    trained(network, some, labels, 90)
    assert all(after < 0.8 * first for after, first in zip(losses(), before, strict=True))
    norm = network.model.get_submodule("norm")
    means = [norm.of_size[str(bits)].running_mean for bits in SIZES]  # type: ignore[index]
    assert not any(torch.equal(means[0], other) for other in means[1:])


def test_a_mix_of_sizes_runs(pictures: tuple[Pictures, Tensor, Tensor]) -> None:
    model, some, _ = pictures
    network = NestedNetwork(model.eval(), ("first", "second"), SIZES)
    mixed = network.set(MIXED)(some)
    assert not torch.equal(mixed, at(network, 8)(some)) and not torch.equal(mixed, at(network, 2)(some))


def test_samplers_draw_mixes_of_a_nested_network(pictures: tuple[Pictures, Tensor, Tensor]) -> None:
    network = NestedNetwork(pictures[0].eval(), ("first", "second"), SIZES)
    subject = BitSwitching(network, Labels(*pictures), shares={5: 0.5})
    sampler = HessianAware(network.decisions, 1, Table({"first": 1.0, "second": 3.0}, {}))
    drawn = [config for step in range(20) for config in sampler.draws(step, 0)]
    assert [subject.bits(config) for config in drawn[:4]][:: len(SIZES) - 1] == [8, 2]
    mixed = next(config for config in drawn if config.format("first") != config.format("second"))
    sizes = {path: int(bits) for path, bits in mixed.formats.items()}
    subject.set(mixed)
    assert torch.equal(network.model(pictures[1]), network.set(mixed)(pictures[1]))
    assert subject.bits(mixed) == pytest.approx((27 * sizes["first"] + 72 * sizes["second"]) / 99)
    assert subject.share(Config.of_formats({"first": "4", "second": "6"})) == 0.5 and subject.share(drawn[0]) == 1


def test_a_killed_run_ends_with_the_same_numbers(pictures: tuple[Pictures, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS", -1.0)
    model, some, labels = pictures
    kept: list[dict[str, Tensor]] = []
    whole = trained(NestedNetwork(copy.deepcopy(model), ("first", "second"), SIZES), some, labels, 4, keep=kept.append)
    again = trained(NestedNetwork(copy.deepcopy(model), ("first", "second"), SIZES), some, labels, 4, checkpoint=kept[1])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_scales_move_slower_at_few_bits() -> None:
    assert [ladder(missing) for missing in (0, 1, 2, 4, 6)] == pytest.approx([1, 0.5, 0.1, 0.01, 0.001])


def test_scales_slow_down_where_gradients_are_large(pictures: tuple[Pictures, Tensor, Tensor]) -> None:
    network = NestedNetwork(pictures[0], ("first", "second"), SIZES)
    subject = BitSwitching(network, Labels(*pictures))
    for factor, gradient in zip(network.factors().values(), (0.5, 7.0), strict=True):
        factor.grad = torch.tensor([gradient])
    config = EverySize(network.decisions, 1).draws(0, 0)[1]
    assert subject.bits(config) == 6
    assert subject.rates(config, 2.0) == {"weights": 2.0, "scales": pytest.approx(2.0 * 0.1 * (1 - 0.75))}


def grid(name: str) -> GridFormat:
    format_ = formats.get(name)
    assert isinstance(format_, GridFormat)
    return format_


def test_which_formats_can_be_nested() -> None:
    bits = {name: found for name in formats if (found := nested_bits(formats.get(name)))}
    assert {"Q8_0": 8, "Q5_0": 5, "Q4_0": 4, "int8_sym": 8, "int2_sym": 2, "int3_sym_g64": 3}.items() <= bits.items()
    assert not {"Q4_K", "Q6_K", "Q4_1", "IQ4_NL", "TQ2_0", "MXFP4", "int4_asym", "int4_offset", "F16"} & set(bits)


@pytest.mark.parametrize(("high", "low"), [("Q8_0", "Q5_0"), ("Q8_0", "Q4_0"), ("int8_sym", "int2_sym"), ("int6_sym", "int3_sym")])
def test_bytes_of_a_coarser_format_stand_for_the_switched_integers(high: str, low: str) -> None:
    """Decoded as a runtime does, against the formula."""
    generator = Generator().manual_seed(0)
    many, few = nested_bits(formats.get(high)), nested_bits(formats.get(low))
    assert many is not None and few is not None
    integers = torch.randint(*bounds(many), (6, 64), generator=generator).to(torch.int8)
    scale = (torch.rand(6, 2, generator=generator) * 1e-3).half()
    data = packed(grid(high), integers, scale)
    assert all(torch.equal(one, other) for one, other in zip(integers_of(grid(high), data), (integers, scale), strict=True))
    expected = double_rounding.values(integers.view(6, 2, 32), scale.float().unsqueeze(-1), many, few).flatten(1)
    assert torch.equal(grid(low).decode(lowered(grid(high), grid(low), data)), expected)
    assert lowered(grid(high), grid(low), data).shape == (6, grid(low).row_bytes(64))


NAMES = ("int8_sym", "int4_sym", "int2_sym")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A short run."""
    recipe = recipes.get("double-rounding")
    assert recipe.training is not None
    few = replace(recipe.training, settings=replace(recipe.training.settings, num_steps=6))  # type: ignore[arg-type, type-var]
    monkeypatch.setitem(recipe.__dict__, "training", few)
    monkeypatch.setattr(finalists, "NUM_FINALISTS", 3)
    monkeypatch.setattr(pipeline, "NUM_PROBE_SEGMENTS", 2)
    notes = tmp_path / "notes.txt"
    notes.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    return {"data": notes, "target": "transformers", "formats": NAMES, "length": 32, "segments": 8, "recipe": "double-rounding"}


def tensors_of(file: Path) -> tuple[dict[str, int], int]:
    """Bytes of each tensor of a file of variants, and those that aren't of tensors; by the file's size on disk."""
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    about = json.loads(data[8:header])
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in about.items() if name != "__metadata__"}
    assert file.stat().st_size == header + sum(sizes.values())
    return sizes, header


def test_the_recipes_store_eight_bits_for_all_sizes(asked: dict[str, object], tmp_path: Path) -> None:
    """With their own formats: no 16 bits, and a scale for as many columns as rows allow; outside the blocks, too."""
    for target, high, low, names in (
        ("transformers", "int8_sym_g64", "int4_sym_g64", {f"int{bits}_sym_g64" for bits in (8, 6, 4, 3, 2)}),
        ("llama.cpp", "Q8_0", "Q4_0", {"Q8_0", "Q5_0", "Q4_0"}),
    ):
        tiny = save_tiny(tmp_path / target, "llama", num_hidden_layers=1, intermediate_size=192)
        family = anyfit.fit(tiny, output=tmp_path / f"{target}.family", **{**asked, "formats": None, "target": target})  # type: ignore[arg-type]
        assert set(family.space.formats()) == names
        weights = [w for d in family.space.decisions for w in d.unit.weights]
        files = {w.name: tensors_of(family.path / "variants" / f"{w.name}.safetensors")[0] for w in weights}
        assert files == {w.name: {high: formats.get(high).bytes_(w.shape)} for w in weights}
        assert sum(sum(own.values()) for own in files.values()) * 8 / sum(w.num_weights for w in weights) == formats.get(high).bits
        if target == "llama.cpp":
            table, store = weights[0], Store(family.path)
            assert table.block is None and any(note.startswith("Outside the blocks the finest integers") for note in family.notes)
            assert torch.equal(store.variant(table.name, low), lowered(grid(high), grid(low), store.variant(table.name, high)))
            errors = store.errors(table.name)
            assert errors["Q4_0"] > errors["Q5_0"] > errors["Q8_0"] > 0


@pytest.mark.parametrize(("hidden", "inner", "group"), [(128, 256, "_g128"), (128, 192, "_g64"), (96, 128, "")])
def test_scales_are_as_few_as_rows_allow(hidden: int, inner: int, group: str, text: Path, tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny", "llama", num_hidden_layers=1, hidden_size=hidden, intermediate_size=inner)
    run = anyfit.api.prepare(tiny, recipe="matquant", target="transformers", data=text, length=32, segments=8)
    assert run.settings.formats == tuple(f"int{bits}_sym{group}" for bits in (8, 6, 4, 3, 2))


def test_one_stored_matrix_holds_every_size(asked: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = save_tiny(tmp_path / "tiny", "llama", num_hidden_layers=1)
    family = anyfit.fit(tiny, output=tmp_path / "whole.family", **asked)  # type: ignore[arg-type]
    weights = [w for d in family.space.decisions for w in d.unit.weights]
    for weight in weights:
        stored, about = tensors_of(family.path / "variants" / f"{weight.name}.safetensors")
        assert stored == {"int8_sym": formats.get("int8_sym").bytes_(weight.shape)}, "eight bits, and the scales"
        assert about < (2**11 if weight.block is not None else 2**15)
    weight = next(weight for weight in weights if weight.block is not None)
    told = [note for note in family.manifest.notes if "nested, KL" in note]
    assert all("trained; stored by itself, by GPTQ and untrained, " in note for note in told)
    assert [note.partition(":")[0] for note in told] == ["int2_sym", "int4_sym", "int8_sym"]
    variant = family.variants(family.space.smallest())
    assert torch.equal(variant(weight.name, "int4_sym"), lowered(grid("int8_sym"), grid("int4_sym"), variant(weight.name, "int8_sym")))
    for budget in ("30%", "45%"):
        assert all(check.passed for check in family.export(budget, tmp_path / f"model{budget[:2]}").checks)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for place, name in ((training, "kl"), (Store, "nest")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                anyfit.fit(tiny, output=tmp_path / "killed.family", **asked)  # type: ignore[arg-type]
    assert anyfit.fit(tiny, output=tmp_path / "killed.family", **asked).digest == family.digest  # type: ignore[arg-type]


def test_what_cannot_be_nested_is_refused_before_any_work(asked: dict[str, object], tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny", "llama", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"No two of the formats .* are nested"):
        anyfit.fit(tiny, output=tmp_path / "x.family", **{**asked, "formats": ("F16", "int4_sym", "int3_asym")})  # type: ignore[arg-type]
    assert not (tmp_path / "x.family").exists() and not list(tmp_path.glob("*.partial"))


def test_transposed_weights_are_nested_along_their_inputs() -> None:
    layer = nn.Linear(64, 8)
    turned = nn.Module()
    turned.weight = nn.Parameter(layer.weight.detach().T.clone())
    outer, other = nn.ModuleDict({"own": layer}), nn.ModuleDict({"own": turned})
    straight = NestedNetwork(outer, ["own"], SIZES, 32)
    transposed = NestedNetwork(other, ["own"], SIZES, 32, {"own"})
    for bits in SIZES:
        values = [at(network, bits).get_submodule("own").weight for network in (straight, transposed)]
        assert torch.equal(values[0].T, values[1])  # type: ignore[union-attr]
    assert torch.equal(straight.stored()["own"].integers, transposed.stored()["own"].integers)
