"""Training every size at once: samplers draw as they say, merges are exact, what isn't drawn is left alone, runs go on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import anyfit
from anyfit import estimates, finalists, pipeline, training
from anyfit.api import prepare
from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.effort import Effort
from anyfit.core.errors import ModelError, UserError
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.elastic.linear import ElasticLinear, ElasticNetwork, GridVariant, Variant
from anyfit.finalists import measuring
from anyfit.formats import formats
from anyfit.progress import Silent
from anyfit.recipes import llm_qfa, recipes
from anyfit.recipes.base import Tuning
from anyfit.scores.table import Table
from anyfit.searchers import correlation, evolution, searchers
from anyfit.searchers.exact import Solver
from anyfit.tasks.language import Reference
from anyfit.testing.models import save_tiny, tiny_model, tiny_text
from anyfit.testing.quantizers import rounded
from anyfit.trainers import decoupled, loop, pv, samplers
from anyfit.trainers.decoupled import Decoupled
from anyfit.trainers.losses import Divergence, MicroBatch, NextTokens, Outputs
from anyfit.trainers.sampling import Frontier, Sampler, Shifted
from anyfit.tuning.coded import Stored, Tuned, repacked

V = TypeVar("V", bound=Variant)
PERIOD = 200
OFFSETS = ("int4_offset", "int3_offset", "int2_offset")
SETTINGS = loop.Settings(num_steps=6, batch_size=2, rate=1e-2, rank=2, num_periods=2)


def decisions(number: int) -> list[Decision]:
    """Matrices of different sizes, one of which can't have two bits."""
    found = []
    for index in range(number):
        weight = Weight(f"{index}.weight", (64 * (1 + index % 3), 256), "up", str(index), index)
        bits = (2, 3, 4) if index else (3, 4)
        choices = tuple(Choice(f"int{b}", b * weight.num_weights // 8, b * weight.num_weights // 8) for b in bits)
        found.append(Decision(Unit(weight.name, (weight,)), choices))
    return found


def losing(about: list[Decision]) -> Table:
    """Every other unit is sensitive; a bit less costs four times as much."""
    errors = {d.unit.name: {choice.name: 4.0 ** -int(choice.name[3]) for choice in d.choices} for d in about}
    return Table({d.unit.name: float(1 + 9 * (index % 2)) for index, d in enumerate(about)}, errors)


def sampler_of(name: str, about: list[Decision]) -> Sampler:
    """Every other unit is sensitive. One that learns has learnt that the smallest sizes still gain."""
    sampler = samplers.get(name)(about, PERIOD, losing(about))
    losses = {0: 1.0, sampler.INTERVAL: 0.5} if isinstance(sampler, Shifted) else {}
    for step, factor in losses.items():
        sampler.observe(step, lambda config: factor / mean_bits(config, about))  # noqa: B023
    return sampler


@pytest.mark.parametrize("name", samplers)
@pytest.mark.parametrize("step", [0, 37, 100, 163])
def test_configs_follow_the_stated_distribution(name: str, step: int) -> None:
    sampler = sampler_of(name, decisions(4))
    stated = sampler.probabilities(step)
    drawn = [config for seed in range(1000) for config in sampler.draws(step, seed)]
    for decision in sampler.decisions:
        counts = Counter(config[decision.key] for config in drawn)
        shares = np.array([counts[choice.name] for choice in decision.choices]) / len(drawn)
        error = np.sqrt(stated[decision.key] * (1 - stated[decision.key]) / len(drawn))
        assert stated[decision.key].sum() == pytest.approx(1)
        rare = 1.5 / len(drawn)  # what is hardly ever drawn may come once
        assert (np.abs(shares - stated[decision.key]) <= 4.5 * error + rare).all(), (decision.key, shares, stated[decision.key])
    assert sampler.draws(step, 3) == sampler_of(name, decisions(4)).draws(step, 3)
    means = [mean_bits(config, decisions(4)) for config in sampler.draws(step, 3)]
    assert means[0] == max(means), "the largest may teach the others"
    assert len(means) >= 1 and all(set(config) == {d.key for d in sampler.decisions} for config in sampler.draws(step, 3))


def mean_bits(config: Config, about: list[Decision]) -> float:
    sizes = [(decision.choice(config[decision.key]).stored_bytes, decision.unit.num_weights) for decision in about]
    return 8 * sum(size for size, _ in sizes) / sum(num for _, num in sizes)


def test_the_balanced_schedule_spends_as_much_on_the_ends_as_on_the_middle() -> None:
    """LLM-QFA's claim: drawn uniformly, the mean of 32 decisions hardly leaves the middle."""
    about = decisions(33)[1:]
    shares = {}
    for name in ("balanced", "uniform"):
        sampler = samplers.get(name)(about, PERIOD)
        found = [mean_bits(sampler.draw(step, 0), about) for step in range(PERIOD)]
        shares[name] = np.histogram(found, bins=8, range=(2, 4))[0] / PERIOD
    assert shares["balanced"].min() > 0.06, shares
    assert shares["uniform"][[0, 1, 6, 7]].max() < 0.02, shares


@pytest.mark.parametrize("name", ["sandwich", "hessian-aware"])
def test_the_largest_and_the_smallest_are_always_trained(name: str) -> None:
    about = decisions(5)
    for step in (0, 100, 250):
        means = [mean_bits(config, about) for config in sampler_of(name, about).draws(step, 1)]
        assert max(means) == 4 and min(means) == mean_bits(Config({d.key: d.choices[0].name for d in about}), about)
        assert len(means) == 3


def test_sensitive_units_draw_more_bits_as_time_goes_on() -> None:
    about = decisions(5)
    early, late = (sampler_of("hessian-aware", about).probabilities(step) for step in (0, PERIOD))
    sensitive, other = about[1].key, about[2].key
    assert early[sensitive] == pytest.approx(np.full(3, 1 / 3), abs=2e-3)
    assert late[sensitive][2] > late[sensitive][0] + 0.02 and late[other][2] == pytest.approx(late[other][0])


def test_bins_that_still_gain_are_drawn_more() -> None:
    """One bin's loss doesn't fall any more, and one's falls most."""
    about = decisions(6)
    sampler = Shifted(about, PERIOD)
    assert sampler.bins == pytest.approx(np.full(Shifted.BINS, 1 / Shifted.BINS))
    losses, seen = np.full(Shifted.BINS, 8.0), list[int]()

    def evaluate(config: Config) -> float:
        seen.append(len(seen) % Shifted.BINS)
        return float(losses[seen[-1]])

    for update in range(6):
        sampler.observe(update * Shifted.INTERVAL, evaluate)
        losses -= np.array([1.0, 0, *[0.5] * (Shifted.BINS - 2)])
    sampler.observe(7, evaluate)
    assert len(seen) == 6 * Shifted.BINS, "between updates nothing is measured"
    assert sampler.bins.argmax() == 0 and sampler.bins.argmin() == 1
    assert Shifted.EVEN / Shifted.BINS < sampler.bins[1] < 0.6 / Shifted.BINS
    again = Shifted(about, PERIOD)
    again.restore(sampler.state())
    assert np.array_equal(again.bins, sampler.bins)


def test_the_frontier_is_that_of_the_exact_search() -> None:
    """At each mean its configs are the exact optimum of that size, but for the unit that the mean falls into and draws that are even."""
    about = decisions(12)
    sampler, table = sampler_of("frontier", about), losing(about)
    assert isinstance(sampler, Frontier)
    space = Space(tuple(about), 0, 0, sum(d.unit.num_weights for d in about))
    for step in range(0, PERIOD // 2, 7):
        stated = sampler.along(step)
        likely = Config({d.key: d.choices[int(stated[d.key].argmax())].name for d in about})
        divided = [d for d in about if stated[d.key].max() < 1 - Frontier.EVEN - 1e-9]
        best = Solver(space, table).solve(Budget.parse(f"{space.bits(likely) + 1e-6:.6f} bits"))
        assert len(divided) <= 1 and table.predict(space, likely) == pytest.approx(table.predict(space, best)), step


def test_the_frontier_draws_its_ends_whole() -> None:
    about, step, number = decisions(6), PERIOD // 4, 2000
    sampler = sampler_of("frontier", about)
    assert isinstance(sampler, Frontier)
    drawn = [sampler.draw(step, seed) for seed in range(number)]
    for pick, share in ((min, Frontier.LEAST), (max, Frontier.MOST)):
        end = Config({d.key: pick(d.choices, key=lambda choice: choice.stored_bytes).name for d in about})
        assert drawn.count(end) / number == pytest.approx(share, abs=0.04)


def test_a_loss_that_is_no_number_is_told(text: Tensor) -> None:
    with pytest.raises(ModelError, match="aren't finite"):
        Shifted(decisions(3), PERIOD).observe(0, lambda _: float("nan"))
    made, about = network()
    next(iter(made.variants().values())).scale.fill_(torch.inf)
    with pytest.raises(ModelError, match="isn't finite at step"):
        run(made, about, text, loop.Settings(num_steps=8, batch_size=2, rank=2, num_periods=1))


@pytest.mark.parametrize("name", ["balanced", "frontier"])
def test_the_expected_mean_is_the_target(name: str) -> None:
    about = decisions(12)
    sampler = samplers.get(name)(about, PERIOD, losing(about))
    for step in (0, 20, 50, 100, 130):
        stated = sampler.along(step) if isinstance(sampler, Frontier) else sampler.probabilities(step)
        means = [sum(p * 8 * c.stored_bytes for p, c in zip(stated[d.key], d.choices, strict=True)) for d in about]
        expected = sum(means) / sum(d.unit.num_weights for d in about)
        assert expected == pytest.approx(sampler.target(step), abs=1e-6)


def stored(name: str, weight: Tensor | None = None, path: str = "m", order: Tensor | None = None) -> Stored:
    """A matrix, rounded."""
    if weight is None:
        weight = torch.randn(24, 256, generator=Generator().manual_seed(0)) * 0.05
    rows, columns = weight.shape
    return rounded(Weight(f"{path}.weight", (rows, columns), "up", path, 0), name, weight, order)


def moved(variant: V, seed: int) -> V:
    """Something other than the zeros that training starts from."""
    generator = Generator().manual_seed(seed)
    for parameter in variant.trained():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return variant


@pytest.mark.parametrize("name", [*OFFSETS, "Q2_K", "Q4_K", "int3_sym", "Q3_K"])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_variant_starts_as_what_is_stored(name: str, ordered: bool) -> None:
    entry = stored(name, order=torch.randperm(24, generator=Generator().manual_seed(1)) if ordered else None)
    assert torch.equal(GridVariant(entry, 4, Generator()).values, entry.values())


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("ordered", [False, True])
def test_adapters_merge_into_offsets_exactly(name: str, ordered: bool) -> None:
    """Adapter on against other offsets; codes and scales are the same to the bit."""
    entry = stored(name, order=torch.randperm(24, generator=Generator().manual_seed(1)) if ordered else None)
    variant = moved(GridVariant(entry, 4, Generator().manual_seed(2)), 3)
    linear = ElasticLinear({name: variant}, torch.randn(24, generator=Generator().manual_seed(4)))
    inputs = torch.randn(5, 7, 256, generator=Generator().manual_seed(5))
    assert variant.adapter is not None
    with torch.no_grad():
        adapted = linear(inputs)
        assert (adapted - nn.functional.linear(inputs, entry.values(), linear.bias)).abs().max() > 1e-2
        assert (adapted - nn.functional.linear(inputs, variant.values, linear.bias)).abs().max() < 1e-4
        scales = variant.format_.assemble({**variant.scales.stored, **variant.merged()})
        sums = variant.adapter.sums if entry.order is None else variant.adapter.sums[entry.order]
        wanted = variant.scales.offset - sums
        inside = (wanted >= 0) & (wanted <= scales.scale * (len(variant.format_.levels) - 1))
        rounding = scales.scale / 512 * 1.001
        assert inside.float().mean() > 0.5
        assert ((scales.offset - wanted).abs() <= rounding)[inside].all()
    codes, again = variant.format_.read(variant.format_.pack(variant.codes if entry.order is None else variant.codes[entry.order], scales))
    before, old = variant.format_.read(entry.data)
    assert torch.equal(codes, before) and torch.equal(again.scale, old.scale) and torch.equal(again.offset, scales.offset)
    merged = repacked(entry.format_, entry.data, variant.merged())
    variant.settle(variant.merged())
    assert torch.equal(variant.values, replace(entry, data=merged).values())


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "Q3_K", "IQ4_NL", "int3_sym", "int2_asym"])
def test_elsewhere_halves_are_multiplied(name: str) -> None:
    variant = moved(GridVariant(stored(name), 4, Generator()), 1)
    running = variant.values.detach()
    variant.settle(variant.merged())
    assert (variant.values - running).abs().max() < 2e-3 * running.abs().max() and not torch.equal(variant.values, stored(name).values())


@pytest.mark.parametrize("name", ["int3_offset", "Q4_K"])
def test_numbers_are_made_of_codes_again_on_the_way_back(name: str) -> None:
    """Gradients are those of the plain product. An adapter's matrix isn't kept: other codes in the meantime are what inputs hear of."""
    inputs = torch.randn(5, 256, generator=Generator().manual_seed(5)).requires_grad_()
    variant = moved(GridVariant(stored(name), 4, Generator().manual_seed(2)), 3)
    (inputs @ variant.values.T).square().sum().backward()
    expected = [value.grad for value in (inputs, *variant.trained())]
    inputs.grad = None
    for value in variant.trained():
        value.grad = None
    output = ElasticLinear({name: variant}, None)(inputs)
    output.square().sum().backward()
    for value, wanted in zip((inputs, *variant.trained()), expected, strict=True):
        assert torch.allclose(value.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())), value.shape
    inputs.grad, total = None, ElasticLinear({name: variant}, None)(inputs).sum()
    before = variant.values.sum(0)
    variant.codes.data.zero_()
    total.backward()
    now = variant.values.sum(0) if variant.adapter else before
    assert torch.allclose(inputs.grad, now.expand(5, -1), rtol=1e-3, atol=1e-4) and not torch.allclose(before, variant.values.sum(0))


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(64, (6, 24), generator=Generator().manual_seed(0))


def network(names: tuple[str, ...] = OFFSETS) -> tuple[ElasticNetwork, list[Decision]]:
    """A tiny Llama, two matrices of which are elastic."""
    model = tiny_model("llama").eval()
    matrices, about = {}, []
    for path in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        values = model.get_parameter(f"{path}.weight").detach()
        entries = {name: stored(name, values, path) for name in names}
        weight = entries[names[0]].weight
        matrices[weight.name] = entries
        sizes = {name: formats.get(name).bytes_(weight.shape) for name in names}
        about.append(Decision(Unit(weight.name, (weight,)), tuple(Choice(name, size, size) for name, size in sizes.items())))
    return ElasticNetwork(model, about, matrices, SETTINGS.rank, 0), about


def state(made: ElasticNetwork) -> dict[str, Tensor]:
    trained = {id(value) for variant in made.variants().values() for value in variant.trained()}
    return {name: value.detach().clone() for name, value in made.model.named_parameters() if id(value) in trained}


def run(made: ElasticNetwork, about: list[Decision], text: Tensor, settings: loop.Settings = SETTINGS, **more: Any) -> None:
    reference = Reference.of(tiny_model("llama").eval(), text)
    sampler = samplers.get(more.pop("sampler", "balanced"))(about, settings.num_steps // settings.num_periods)
    subject = Decoupled(made, Divergence(made.model, reference))
    loop.train(subject, sampler, settings, **{"checkpoint": {}, "keep": lambda _: None, "progress": Silent(), **more})


def test_what_is_not_drawn_is_left_alone(text: Tensor) -> None:
    made, about = network()
    before, drawn = state(made), samplers.get("balanced")(about, 1).draw(0, 0)
    run(made, about, text, loop.Settings(num_steps=1, batch_size=2, rank=2, num_periods=1))
    for name, value in state(made).items():
        chosen = any(f"{d.unit.name.removesuffix('.weight')}.variants.{drawn[d.key]}." in name for d in about)
        assert torch.equal(value, before[name]) != chosen or (chosen and name.endswith("down")), name


def test_training_lowers_the_divergence(text: Tensor) -> None:
    made, about = network()
    reference = Reference.of(tiny_model("llama").eval(), text)
    small = {d.key: "int2_offset" for d in about}
    before = training.kl(made.set(small), reference)
    run(made, about, text, loop.Settings(num_steps=40, batch_size=6, rate=1e-2, rank=2, num_periods=2))
    assert training.kl(made.set(small), reference) < 0.9 * before


def test_losses_count_over_what_their_configs_are_expected_to_lose(text: Tensor) -> None:
    """So that a step in which most is lost weighs as much as others; what is expected to lose nothing doesn't weigh without bounds."""
    made, about = network()
    reference = Reference.of(tiny_model("llama").eval(), text)
    bits = {choice.name: int(choice.name[3]) for choice in about[0].choices}
    errors = {d.unit.name: {name: 4.0**-number for name, number in bits.items()} for d in about}
    table = Table({d.unit.name: 1.0 + index for index, d in enumerate(about)}, errors)
    objective = Divergence(made.model, reference)
    subject, plain = Decoupled(made, objective, table), Decoupled(made, objective)
    configs = [Config({d.key: name for d in about}) for name in bits]
    mixed = Config({d.key: OFFSETS[index % 3] for index, d in enumerate(about)})
    space = Space(tuple(about), 0, 0, 1)
    for config in (*configs, mixed):
        assert subject.share(config) * table.predict(space, config) == pytest.approx(
            table.predict(space, Config({d.key: OFFSETS[2] for d in about}))
        )
        assert plain.share(config) == 1
    lossless = Table(
        table.sensitivity, {unit: {name: value * (name != OFFSETS[0]) for name, value in own.items()} for unit, own in errors.items()}
    )
    assert Decoupled(made, objective, lossless).share(Config({d.key: OFFSETS[0] for d in about})) == decoupled.MOST_SHARE


def test_products_in_bfloat16_leave_loss_and_gradients_near(text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    (made, about), reference = network(), Reference.of(tiny_model("llama").eval(), text)
    subject, batch = Decoupled(made, Divergence(made.model, reference)), MicroBatch(0, torch.arange(len(text)))
    subject.set(Config({d.key: "int2_offset" for d in about}))
    trained = {name: value.requires_grad_() for name, value in subject.groups["variants"].items() if ".int2_offset." in name}
    losses, gradients = [], []
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"avx512_bf16": fast})
        outputs = subject.objective.outputs(batch)
        assert outputs.logits is not None and outputs.logits.dtype == (torch.bfloat16 if fast else torch.float32)
        loss = subject.objective.loss(outputs, batch)
        gradients.append(torch.autograd.grad(loss, list(trained.values())))
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    for (name, value), exact, coarse in zip(trained.items(), *gradients, strict=True):
        assert value.dtype == coarse.dtype == torch.float32
        assert (coarse - exact).norm() <= 0.1 * exact.norm(), name


@pytest.mark.parametrize("sampler", ["balanced", "sandwich", "shifted"])
def test_a_run_goes_on_from_any_checkpoint_to_the_same_numbers(sampler: str, text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS", -1.0)
    monkeypatch.setattr(Shifted, "INTERVAL", 2)
    whole, about = network()
    kept: list[dict[str, Tensor]] = []
    run(whole, about, text, keep=kept.append, sampler=sampler)
    assert [int(entry["step"]) for entry in kept] == [1, 2, 3, 4, 5, 6]
    for checkpoint in (kept[0], kept[3]):
        again, _ = network()
        run(again, about, text, checkpoint=checkpoint, sampler=sampler)
        for name, value in state(whole).items():
            assert torch.equal(value, state(again)[name]), name


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = llm_qfa.RECIPE
    assert recipe.training is not None
    few = replace(recipe.training, settings=loop.Settings(num_steps=20, batch_size=4, rate=3e-3, rank=4, num_periods=2))
    monkeypatch.setattr(llm_qfa, "RECIPE", type(recipe)(**{**vars(recipe), "training": few}))
    monkeypatch.setattr(finalists, "NUM_FINALISTS", 4)
    monkeypatch.setattr(pipeline, "NUM_PROBE_SEGMENTS", 4)
    assert recipes.get("llm-qfa").training == few


@pytest.mark.parametrize(
    ("target", "names"), [("transformers", ("F16", "int8_asym", "int3_offset", "int2_offset")), ("llama.cpp", ("F16", "Q4_K", "Q2_K"))]
)
def test_a_trained_family_is_exported_and_a_killed_run_continues(
    target: str, names: tuple[str, ...], few_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, notes = save_tiny(tmp_path / "tiny", "llama"), tmp_path / "notes.txt"
    notes.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    asked: dict[str, Any] = {"data": notes, "target": target, "formats": names, "length": 32, "segments": 8, "recipe": "llm-qfa"}
    family = anyfit.fit(tiny, output=tmp_path / "whole.family", **asked)
    told = [note for note in family.manifest.notes if "trained, KL" in note]
    assert target != "transformers" or any("left as it was" not in note for note in told), told
    assert [note.partition(":")[0] for note in told] == [name for name in family.space.formats() if name in names[-2:]]
    assert all(check.passed for check in family.export("35%", tmp_path / ("model" + (".gguf" if target == "llama.cpp" else ""))).checks)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    for place, name in ((training.Training, "_measured"), (pipeline.Store, "rewrite")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                anyfit.fit(tiny, output=tmp_path / "killed.family", **asked)
    assert anyfit.fit(tiny, output=tmp_path / "killed.family", **asked).digest == family.digest
    assert not list((tmp_path / "killed.family").glob("training*"))


def test_a_format_that_lost_keeps_what_it_had(few_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, notes = save_tiny(tmp_path / "tiny", "llama"), tmp_path / "notes.txt"
    notes.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    asked: dict[str, Any] = {"data": notes, "formats": ("F16", "Q4_K", "Q2_K"), "length": 32, "segments": 8}
    plain = anyfit.fit(tiny, output=tmp_path / "plain.family", **asked)
    calls: list[str] = []

    def measured(_: Any, network: ElasticNetwork, name: str, held_out: Reference) -> float:
        """Falls while training lasts; then one format is worse than it was."""
        calls.append(name)
        ended = not any(p.requires_grad for variant in network.variants().values() for p in variant.parameters())
        return 2.0 if ended and name != network.decisions[0].choices[0].name else 1 / len(calls)

    monkeypatch.setattr(training.Training, "_measured", measured)
    family = anyfit.fit(tiny, output=tmp_path / "trained.family", recipe="llm-qfa", **asked)
    better, worse = (choice.name for choice in training.trained(family.space)[0].choices)
    weight = next(w for d in family.space.decisions for w in d.unit.weights if w.block is not None)
    for name, same in ((better, False), (worse, True)):
        ours, theirs = (one.variants(one.space.uniform(name))(weight.name, name) for one in (family, plain))
        assert torch.equal(ours, theirs) == same


def test_the_text_itself_is_a_loss(text: Tensor) -> None:
    model = tiny_model("llama")
    objective, batch = NextTokens(model, Reference.of(model, text)), MicroBatch(0, torch.tensor([4, 1]))
    with torch.no_grad():
        found = objective.loss(objective.outputs(batch), batch)
        expected = model(input_ids=text[[4, 1]], labels=text[[4, 1]]).loss
    assert float(found) == pytest.approx(float(expected), rel=2e-3)  # products may be in bfloat16


def test_a_family_is_trained_towards_its_text_for_as_long_as_that_helps(
    few_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, notes = save_tiny(tmp_path / "tiny", "llama"), tmp_path / "notes.txt"
    notes.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    asked: dict[str, Any] = {"data": notes, "formats": ("F16", "Q4_K", "Q2_K"), "length": 32, "segments": 8, "recipe": "llm-qfa"}
    used, looks = list[tuple[type, bool]](), list[float]()
    monkeypatch.setattr(training.Gain, "kept", True)
    monkeypatch.setattr(loop, "EVERY", 1)
    waited = loop._Best.waited

    def subject(network: ElasticNetwork, objective: Any, expected: Any) -> Decoupled:
        used.append((type(objective), expected is not None))
        return Decoupled(network, objective, expected)

    def looked(best: Any, loss: float) -> int:
        looks.append(loss)
        return waited(best, 1.0 if len(looks) == 1 else 2.0)

    monkeypatch.setattr(training, "Decoupled", subject)
    monkeypatch.setattr(loop._Best, "waited", looked)
    plain = anyfit.fit(tiny, output=tmp_path / "plain.family", **asked)
    assert used == [(Divergence, True)] and not looks
    impatient = anyfit.fit(tiny, output=tmp_path / "impatient.family", patience=2, **asked)
    assert len(looks) == 4, "the best, two that are no better, and the last state"
    assert impatient.digest != plain.digest
    towards = anyfit.fit(tiny, output=tmp_path / "task.family", towards="task", **asked)
    assert used == [(Divergence, True)] * 2 + [(NextTokens, False)] and towards.digest != plain.digest


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "gptq", "towards": "task"}, "trains nothing towards 'task'.*llm-qfa"),
        ({"recipe": "pv-tuning", "towards": "task"}, "trains nothing towards 'task'"),
        ({"recipe": "gptq", "patience": 3}, "nothing that could end early.*pv-tuning"),
        ({"recipe": "llm-qfa", "towards": "labels"}, "towards 'labels'.*original, task"),
        ({"recipe": "llm-qfa", "patience": 0}, "patience of 0"),
    ],
)
def test_what_training_is_asked_for_is_looked_at_first(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        anyfit.fit(output=tmp_path / "x.family", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["llm-qfa", "pv-tuning", "qat"])
def test_a_recipe_with_nothing_to_train_is_refused_before_any_work(recipe: str, tmp_path: Path) -> None:
    tiny, notes = save_tiny(tmp_path / "tiny", "llama"), tmp_path / "notes.txt"
    notes.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    with pytest.raises(UserError, match="has nothing to train"):
        anyfit.fit(tiny, data=notes, output=tmp_path / "x.family", formats=("F16", "Q8_0"), length=32, segments=8, recipe=recipe)
    assert not list(tmp_path.glob("x.family*"))


def test_tuned_variants_are_what_is_exported_and_a_killed_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What held-out text says is made up here, as a network of random numbers learns nothing that lasts."""
    recipe = recipes.get("pv-tuning")
    assert recipe.training is not None
    settings = pv.Settings(num_steps=4, code_rate=0.3)
    monkeypatch.setitem(recipe.__dict__, "training", Tuning(settings))
    monkeypatch.setattr(finalists, "NUM_FINALISTS", 3)
    monkeypatch.setattr(pipeline, "NUM_PROBE_SEGMENTS", 4)
    tiny, notes = save_tiny(tmp_path / "tiny", "llama", num_hidden_layers=1), tmp_path / "notes.txt"
    notes.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    asked: dict[str, Any] = {"data": notes, "formats": ("F16", "Q4_K", "Q2_K"), "length": 32, "segments": 8}
    plain = anyfit.fit(tiny, output=tmp_path / "plain.family", **asked)
    told = {"Q2_K": (1.0, 0.5), "Q4_K": (1.0, 2.0)}

    def tune(network: Any, matrices: Any, *rest: Any, **more: Any) -> Tuned:
        name = next(iter(matrices.values())).coded.format_.name
        return Tuned(pv_tune(network, matrices, *rest, **more).coded, *told[name])

    pv_tune = pv.tune
    monkeypatch.setattr(pv, "tune", tune)
    family = anyfit.fit(tiny, output=tmp_path / "tuned.family", recipe="pv-tuning", **asked)
    assert any(note == "Q2_K: trained, KL 1 before and 0.5 after on held-out text" for note in family.manifest.notes)
    assert any(note.startswith("Q4_K: trained, KL 1 before and 2 after") for note in family.manifest.notes)
    assert any(note.startswith("F16: not trained") for note in family.manifest.notes)
    weight = next(w for d in family.space.decisions for w in d.unit.weights if w.block is not None)
    for name, same in (("Q2_K", False), ("Q4_K", True)):
        ours, theirs = (one.variants(one.space.uniform(name))(weight.name, name) for one in (family, plain))
        assert torch.equal(ours, theirs) == same
    assert all(check.passed for check in family.export("30%", tmp_path / "model.gguf").checks)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "SECONDS", -1.0)
    read, write, steps = Divergence.outputs, training.Store.write_tensors, list[str]()

    def counted(objective: Divergence, batch: MicroBatch) -> Outputs:
        steps.append("micro-batch")
        return read(objective, batch)

    def stopping(store: Any, name: str, tensors: Any) -> None:
        write(store, name, tensors)
        if len(steps) == 2 * (settings.num_steps + 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(Divergence, "outputs", counted)
    for place, name, stop in (
        (training.Store, "write_tensors", stopping),
        (training.Tuning, "_bytes", stopped),
        (pipeline.Store, "rewrite", stopped),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stop)
            with pytest.raises(KeyboardInterrupt):
                anyfit.fit(tiny, output=tmp_path / "killed.family", recipe="pv-tuning", **asked)
        kept = {path.name for path in (tmp_path / "killed.family.partial" / training.FOLDER).glob("* checkpoint.*")}
        assert kept == ({"Q2_K checkpoint.safetensors"} if stop is stopping else set()), "in the second format"
    assert len(steps) == 2 * 2 * settings.num_steps, "no step twice"
    assert anyfit.fit(tiny, output=tmp_path / "killed.family", recipe="pv-tuning", **asked).digest == family.digest


@pytest.fixture
def trained_tiny(few_steps: None, tmp_path: Path) -> dict[str, Any]:
    """What to fit, with a recipe that trains."""
    notes = tmp_path / "notes.txt"
    notes.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    asked: dict[str, Any] = {"data": notes, "target": "transformers", "formats": ("F16", *OFFSETS), "length": 32, "segments": 8}
    return {"model": save_tiny(tmp_path / "tiny", "llama"), "recipe": "llm-qfa", **asked}


@pytest.mark.parametrize("search", ["correlation", "evolution"])
def test_what_a_searcher_proposes_of_a_trained_network_competes_and_a_killed_run_continues(
    search: str, trained_tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correlation, "SETTINGS", correlation.Settings(first=12, then=6))
    monkeypatch.setattr(evolution, "GENERATIONS", 2)
    exact = anyfit.fit(output=tmp_path / "exact.family", **trained_tiny)
    family = anyfit.fit(output=tmp_path / "whole.family", search=search, **trained_tiny)
    assert family.manifest.provenance["search"] == search and exact.manifest.provenance["search"] == "exact"
    ours, theirs = ({point.config: point for point in one.points} for one in (family, exact))
    assert all(ours[config].search == point.search for config, point in theirs.items())
    assert search == "evolution" or len(ours) > len(theirs)
    for point in family.points:
        best = family.select(f"{point.bytes_} B")
        assert best.bytes_ <= point.bytes_ and (best.search is None or best.search.loss <= point.search.loss)
    assert not (family.path / "searched").exists()

    calls, reference = list[int](), finalists.Finalists._reference

    def killing(self: finalists.Finalists, num_segments: int) -> Any:
        calls.append(num_segments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return reference(self, num_segments)

    monkeypatch.setattr(finalists.Finalists, "_reference", killing)
    with pytest.raises(KeyboardInterrupt):
        anyfit.fit(output=tmp_path / "killed.family", search=search, **trained_tiny)
    with pytest.raises(UserError, match=r"search was .*"):
        anyfit.fit(output=tmp_path / "killed.family", **trained_tiny)
    assert anyfit.fit(output=tmp_path / "killed.family", search=search, **trained_tiny).digest == family.digest


def test_a_searcher_that_is_not_known_or_cannot_search_is_refused_before_any_work(trained_tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Unknown searcher 'random'.*Known: correlation, evolution, exact"):
        anyfit.fit(output=tmp_path / "x.family", search="random", **trained_tiny)
    asked = trained_tiny | {"recipe": "essential-sparsity", "formats": None}
    with pytest.raises(UserError, match="correlation can't search what essential-sparsity decides about"):
        anyfit.fit(output=tmp_path / "x.family", search="correlation", **asked)
    assert not list(tmp_path.glob("x.family*"))


def test_high_effort_and_searchers_that_measure_add_up_and_are_planned_for(trained_tiny: dict[str, Any]) -> None:
    assert measuring("exact", Effort.NORMAL) == {} and measuring("correlation", Effort.LOW).keys() == {"correlation"}
    assert measuring("exact", Effort.HIGH) == {"evolution": finalists.NUM_REFINED}
    assert measuring("evolution", Effort.HIGH) == {"evolution": finalists.NUM_FINALISTS}
    assert measuring("correlation", Effort.HIGH).keys() == {"evolution", "correlation"}
    asked = trained_tiny | {"recipe": "gptq"}
    exact, *others = (prepare(**asked, search=search) for search in searchers)
    assert not estimates._takes_all(exact) and estimates._more_effort(exact, {}) == 0
    assert all(estimates._takes_all(run) and estimates._more_effort(run, {}) > 0 for run in others)
