"""Networks from which parts were left out, trained: the losses, the whole shape again, one size, and one size after another."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

import anyfit
from anyfit import network, structuring
from anyfit.api import prepare
from anyfit.architectures import architecture_of
from anyfit.architectures.coverage import passthrough
from anyfit.core.config import Config
from anyfit.core.errors import BudgetError, FamilyError, UserError
from anyfit.core.units import Weight
from anyfit.family import Family
from anyfit.family.store import refined_file
from anyfit.interface import PADDING
from anyfit.progress import Silent
from anyfit.recipes import recipes
from anyfit.recovery import Recovery
from anyfit.refinement import refine
from anyfit.structure.cutting import Kept, cut, sizes, whole_again
from anyfit.structure.levels import kept_of
from anyfit.tasks.language import Reference, measure
from anyfit.testing.models import tiny_model
from anyfit.trainers import loop
from anyfit.trainers.losses import Both, Divergence, MicroBatch, TokenDistance, token_distance
from anyfit.trainers.whole import Always, Whole

pytestmark = pytest.mark.usefixtures("few_sizes")
LENGTH = 32
BUDGETS = ("macs <= 40%", "macs <= 30%", "macs <= 20%")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def tokens(number: int, model: PreTrainedModel, seed: int = 0) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (number, 12), generator=Generator().manual_seed(seed))


def test_token_distance_is_a_mean_over_tokens_and_layers() -> None:
    states, expected = ([random(3, 5, 8, seed=seed + layer) for layer in range(2)] for seed in (0, 10))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    found, counted = 0.0, [(i, j) for i in range(3) for j in range(5) if mask[i, j]]
    for own, other in zip(states, expected, strict=True):
        squares = sum(float((own[place] - other[place]) @ (own[place] - other[place])) for place in counted)
        found += squares / sum(float(other[place] @ other[place]) for place in counted) / 2
    assert float(token_distance(states, expected, mask)) == pytest.approx(found, rel=1e-5)
    assert float(token_distance(states, expected)) != pytest.approx(found, rel=1e-3)
    assert float(token_distance([1e3 * own for own in states], [1e3 * other for other in expected], mask)) == pytest.approx(found, rel=1e-4)


def encoder(seed: int) -> BertModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)).eval()


def trained(model: PreTrainedModel, objective: Both | TokenDistance, steps: int) -> None:
    always = Always(Config.of_formats({"all": "F32"}))
    settings = loop.Settings(num_steps=steps, batch_size=4, rate=2e-3)
    loop.train(Whole(model, objective, 32.0), always, settings, checkpoint={}, keep=lambda _: None, progress=Silent())


def test_a_network_without_predictions_learns_from_states_alone() -> None:
    """An encoder, and padding: what is there isn't attended to, and doesn't count."""
    original, model = encoder(0), encoder(1)
    some, mask = tokens(8, model), torch.ones(8, 12, dtype=torch.bool)
    mask[:, 9:] = False
    objective, all_of_it = TokenDistance(model, original, some.masked_fill(~mask, PADDING)), MicroBatch(0, torch.arange(8))
    outputs = objective.outputs(all_of_it)
    assert outputs.logits is None and [tuple(own.shape) for own in outputs.states] == [(8, 12, 32)] * 3
    before = float(objective.loss(outputs, all_of_it).detach())
    padded = TokenDistance(model, original, torch.cat([some[:, :9], torch.full((8, 5), PADDING)], 1))
    assert float(padded.loss(padded.outputs(all_of_it), all_of_it).detach()) == pytest.approx(before, rel=1e-5)
    trained(model, objective, 30)
    assert float(objective.loss(objective.outputs(all_of_it), all_of_it)) < 0.7 * before
    same = TokenDistance(original, original, some)
    assert float(same.loss(same.outputs(all_of_it), all_of_it).detach()) == 0


def test_both_losses_are_added_up() -> None:
    original, model = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    some, batch = tokens(4, model), MicroBatch(0, torch.tensor([2, 0]))
    parts = Divergence(model, Reference.of(original, some)), TokenDistance(model, original, some)
    both = Both(*parts, 0.3)
    with torch.no_grad():
        alone = [float(part.loss(part.outputs(batch), batch)) for part in parts]
        assert float(both.loss(both.outputs(batch), batch)) == pytest.approx(alone[0] + 0.3 * alone[1], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in recipes if recipes.get(name).recovery])
def test_language_models_learn_from_predictions_and_states(name: str) -> None:
    how, original, model = recipes.get(name).recovery, tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    assert how is not None and how.states > 0
    objective = Recovery(original, tokens(4, model), how, how.settings, Silent())._objective(model)
    batch = MicroBatch(0, torch.tensor([0, 3]))
    with torch.no_grad():
        outputs = objective.outputs(batch)
        predictions = Divergence(model, Reference.of(original, tokens(4, model))).loss(outputs, batch)
        states = TokenDistance(model, original, tokens(4, model)).loss(outputs, batch)
        assert float(objective.loss(outputs, batch)) == pytest.approx(float(predictions + how.states * states), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "phi3", "qwen3", "gemma2"])
def test_a_cut_network_in_the_whole_shape_computes_the_same(kind: str) -> None:
    """Of one block some parts are left, of another none."""
    model = tiny_model(kind)
    architecture, nothing = architecture_of(model), torch.arange(0)
    kept = [Kept(torch.tensor([1]), torch.arange(3, sizes(model, architecture)[0].channels, 2)), Kept(nothing, nothing)]
    kept += [Kept()] * (architecture.num_blocks(model) - 2)
    small = cut(copy.deepcopy(model), architecture, kept)
    for name, parameter in small.named_parameters():  # trained since it was cut
        parameter.add_(0.01 * random(*parameter.shape, seed=len(name)))
    made = whole_again(small, network.skeleton(model.config, trust_remote_code=False), architecture, kept)
    assert {name: tensor.shape for name, tensor in made.items()} == {n: t.shape for n, t in passthrough(model, ())[0].items()}
    whole, some = copy.deepcopy(model), tokens(2, model)
    whole.load_state_dict(made, strict=False)
    assert torch.allclose(whole(some).logits, small(some).logits, atol=1e-4)
    frame = network.frame(model.config, trust_remote_code=False)
    first = [Kept(*(None if own is None else torch.arange(len(own)) for own in (block.groups, block.channels))) for block in kept]
    filled = network.fill(cut(frame, architecture, first), Path(), passthrough(small, ())[0])
    assert torch.equal(filled(some).logits, small(some).logits), "which parts are left doesn't matter to what is left"


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """A minute's training is too much for a test."""
    recipe = recipes.get("ziplm")
    assert recipe.recovery is not None
    given, settings = recipe.recovery, loop.Settings(num_steps=24, batch_size=4, rate=1e-3)
    recipe.__dict__["recovery"] = replace(given, settings=settings)
    yield
    recipe.__dict__["recovery"] = given


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path) -> Path:
    return tiny_llama_folder


def fitted(model: Path, text: Path, output: Path, **wishes: object) -> Family:
    asked = {"target": "transformers", "recipe": "ziplm", "length": LENGTH, "segments": 48, "effort": "normal", "data": text}
    return anyfit.fit(model, output=output, **{**asked, **wishes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def family(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return fitted(model, text, tmp_path_factory.mktemp("families") / "tiny.family", recover=BUDGETS)


def kl_of(family: Family, config: Config) -> float:
    reference = Reference.of(family.extract(family.space.largest()), family.text()["search"])
    return measure(family.extract(config), reference).kl_mean


@pytest.mark.parametrize("budget", BUDGETS)
def test_each_budget_has_a_network_of_its_own(family: Family, tmp_path: Path, budget: str) -> None:
    point = family.select(budget)
    assert point.refined and point.search is not None and point.unrefined is not None
    assert point.search.kl_mean < point.unrefined
    assert kl_of(family, point.config) == pytest.approx(point.search.kl_mean, rel=1e-4)
    made = family.export(budget, tmp_path / "small")
    assert made.point.config == point.config and all(check.passed for check in made.checks), made.checks
    assert made.bytes_ == point.bytes_
    kept = [kept_of(point.config[decision.key]) for decision in family.space.decisions]
    small = family.extract(budget)
    assert [n for own in sizes(small, architecture_of(small)) for n in (own.groups, own.channels)] == kept


def test_each_is_a_part_of_the_one_before(family: Family) -> None:
    configs = [family.select(budget).config for budget in BUDGETS]
    for larger, smaller in pairwise(configs):
        assert all((kept_of(larger[key]) or 0) >= (kept_of(smaller[key]) or 0) for key in larger)
    assert len(set(configs)) == len(BUDGETS)


def test_nothing_but_the_family_is_left(family: Family) -> None:
    assert {path.name for path in (family.path / "refined").iterdir()} == {
        Path(refined_file(point.config)).name for point in family.points if point.refined
    }
    assert {path.name for path in family.path.iterdir()} == {
        *("family.json", "report.html", "variants", "source", "refined", "passthrough.safetensors", "text.safetensors")
    }


def test_budgets_between_take_the_best_that_fits(family: Family) -> None:
    """A trained network that is smaller than it need be, or parts of the original that are larger: whichever is closer."""
    small, large = (family.select(budget) for budget in BUDGETS[1::-1])
    assert small.search is not None and large.search is not None
    chosen = family.select("macs <= 35%")
    assert chosen.config == small.config or family.expected(chosen.predicted) < small.search.kl_mean


def test_killed_and_continued(model: Path, text: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the second network is trained, and while the third is pruned."""
    monkeypatch.setattr(loop, "SECONDS", -1.0)
    update, prune, steps, pruned = loop.Adam.step, structuring._Pruner._prune, list[str](), list[str]()
    dies_after = {"steps": 24 + 10, "pruned": 1000}

    def counted(*given: object) -> None:
        if len(steps) == dies_after["steps"]:
            raise KeyboardInterrupt
        steps.append("step")
        update(*given)  # type: ignore[arg-type]

    def counts(self: structuring._Pruner, weight: Weight, statistics: object) -> None:
        if len(pruned) == dies_after["pruned"]:
            raise KeyboardInterrupt
        pruned.append(weight.name)
        prune(self, weight, statistics)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.Adam, "step", counted)
    monkeypatch.setattr(structuring._Pruner, "_prune", counts)
    for limits in ({"steps": 24 + 10}, {"steps": 1000, "pruned": 2 * 4 + 1}):
        dies_after |= limits
        with pytest.raises(KeyboardInterrupt):
            fitted(model, text, tmp_path / "again.family", recover=BUDGETS)
    assert (len(steps), len(pruned)) == (2 * 24, 2 * 4 + 1)
    dies_after["pruned"] = 1000
    assert fitted(model, text, tmp_path / "again.family", recover=BUDGETS).digest == family.digest
    assert (len(steps), len(pruned)) == (3 * 24, 3 * 4)


def test_one_size_of_a_finished_family(model: Path, text: Path, tmp_path: Path) -> None:
    plain = fitted(model, text, tmp_path / "plain.family")
    before = plain.select(BUDGETS[0])
    made = refine(plain, BUDGETS[0], model=model)
    assert made.kept and made.after.kl_mean < made.before.kl_mean
    again = Family.open(plain.path)
    point = again.select(BUDGETS[0])
    assert point.refined and point.config == before.config and point.bytes_ == before.bytes_
    assert kl_of(again, point.config) == pytest.approx(made.after.kl_mean, rel=1e-4)
    assert refine(again, BUDGETS[0], model=model).already
    with pytest.raises(UserError, match="the original itself"):
        refine(again, "200%", model=model)


def test_what_can_not_be_recovered_says_so(model: Path, text: Path) -> None:
    asked = {"data": text, "length": LENGTH, "segments": 16, "target": "transformers"}
    with pytest.raises(UserError, match="gptq leaves nothing out"):
        prepare(model, recover=["50%"], recipe="gptq", **asked)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="no tighter than 'macs <= 50%'"):
        prepare(model, recover=["macs <= 50%", "macs <= 60%"], recipe="ziplm", **asked)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="whole network meets the budget 'macs <= 100%'"):
        prepare(model, recover=["macs <= 100%", "macs <= 60%"], recipe="ziplm", **asked)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="No budget was named"):
        prepare(model, recover=[], recipe="ziplm", **asked)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="can't be met"):
        prepare(model, recover=["80%", "1B"], recipe="ziplm", **asked)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="none was measured"):
        prepare(model, recover=["2ms"], recipe="ziplm", **asked)  # type: ignore[arg-type]
    assert anyfit.plan(model, recover=BUDGETS, recipe="ziplm", **asked).seconds > 0  # type: ignore[arg-type]


def test_matrices_in_integers_are_not_trained(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    family = fitted(model, text, tmp_path / "joint.family", target="onnxruntime", formats=["F32", "int4_sym"], recover=["macs <= 40%"])
    point = family.select("macs <= 40%")
    assert all(name.endswith("F32") for name in next(p.config for p in family.points if p.refined).values())
    made = family.export("macs <= 40%", tmp_path / "small")
    assert made.point.config == point.config and all(check.passed for check in made.checks), made.checks
    least = f"{family.space.bytes_(family.space.smallest()) + 1000}B"
    if set(family.select(least).config.formats.values()) != {"F32"}:
        with pytest.raises(UserError, match="is trained in F32"):
            refine(family, least, model=model)


def test_what_was_trained_is_written_as_gguf(model: Path, text: Path, tmp_path: Path) -> None:
    """Whose rows lie in another order than the checkpoint's, in the whole network and in what is left of it."""
    family = fitted(model, text, tmp_path / "gguf.family", target="llama.cpp", formats=["F32"], recover=BUDGETS[:2])
    point = family.select(BUDGETS[1])
    assert point.refined and point.search is not None
    assert kl_of(family, point.config) == pytest.approx(point.search.kl_mean, rel=1e-4)
    made = family.export(BUDGETS[1], tmp_path / "small.gguf")
    assert made.point.config == point.config and all(check.passed for check in made.checks), made.checks


def test_a_member_is_not_taken_for_another(family: Family, tmp_path: Path) -> None:
    """What a file of numbers says is checked before it is used."""
    broken = Family.open(shutil.copytree(family.path, tmp_path / "broken.family"))
    point = broken.select(BUDGETS[0])
    path = broken.path / refined_file(point.config)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FamilyError, match="was altered"):
        broken.extract(point.config)
