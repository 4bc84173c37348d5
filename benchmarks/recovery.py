"""Pruned networks that are trained: sections of benchmarks/structure.py."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from table import Row, Section
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit import Family
from anyfit.api import prepare
from anyfit.core.budget import Budget
from anyfit.core.config import Config, format_of
from anyfit.core.space import Space
from anyfit.elastic.model import ElasticModel
from anyfit.family.store import Decoder, Store
from anyfit.progress import to_stderr
from anyfit.recipes import recipes
from anyfit.recipes.base import Recovery as RecoveryRecipe
from anyfit.recovery import Recovery
from anyfit.scores.kl import num_probes
from anyfit.searchers import layer_weights
from anyfit.searchers.evolution import Settings, Stage, evolve
from anyfit.searchers.exact import Solver
from anyfit.structure.levels import Structure, kept_of
from anyfit.targets import targets
from anyfit.tasks.language import Quality, Reference, kl, measure
from anyfit.trainers.loop import Trainable, train
from anyfit.trainers.losses import Divergence
from anyfit.trainers.sampling import Draws
from anyfit.tuning.refining import windows

BUDGETS = ("1.5x", "2x")
SEARCHED = ("1.5x", "2x")
EVALUATIONS = (9, 50)
NUM_FITNESS = 8
"""Segments of the calibration split that searches measure on."""


@dataclass
class Subject:
    """A family that was pruned, not trained; its original, and the report split."""

    family: Family
    latency: Path

    def __post_init__(self) -> None:
        self.original = self.family.extract(self.family.space.largest())
        self.text = self.family.text()
        self.reference = Reference.of(self.original, self.text["report"])

    def trained(self, budget: str, steps: int, **changes: float) -> Quality:
        """What a budget chooses, cut and trained as the recipe does, but for `changes` of that."""
        point = self.family.select(budget)
        model = self.family.extract(point.config)
        how = self.how(steps, **changes)
        with tempfile.TemporaryDirectory() as folder:
            Recovery(self.original, self.text["calibration"], how, how.settings, to_stderr()).run(
                model, point.config, point.bits, store=Store(Path(folder)), checkpoint="checkpoint.safetensors"
            )
        return measure(model, self.reference)

    def how(self, steps: int, **changes: float) -> RecoveryRecipe:
        found = recipes.get("ziplm").recovery
        assert found is not None
        return replace(found, settings=replace(found.settings, num_steps=steps), **changes)

    def of(self, budget: str) -> Quality:
        return measure(self.family.extract(budget), self.reference)


def recovery(family: Family, latency: Path, steps: int) -> Section:
    """One-shot, trained, and gradual against one step, at equal numbers of training steps in all."""
    subject, how = Subject(family, latency), recipes.get("ziplm").recovery
    assert how is not None
    stepped, shared = _stepped(subject, steps), _shared(subject, steps * len(BUDGETS))
    rows = []
    for budget in BUDGETS:
        before, sofar = subject.of(budget), steps * (BUDGETS.index(budget) + 1)
        found = {
            "logits": subject.trained(budget, steps, states=0.0),
            "logits and states": subject.trained(budget, steps),
        }
        if sofar > steps:
            found["one step"] = subject.trained(budget, sofar)
        point = stepped.select(budget)
        gradual = measure(stepped.extract(point.config), subject.reference)
        rows.append(_row(budget, "one shot", 0, before, None))
        rows += [_row(budget, name, steps, found[name], found[name].kl_mean < before.kl_mean) for name in ("logits", "logits and states")]
        if sofar > steps:
            rows.append(_row(budget, "in one step", sofar, found["one step"], None))
            rows.append(_row(budget, "gradually", sofar, gradual, gradual.kl_mean <= found["one step"].kl_mean))
        rows.append(_row(budget, "one network for all sizes", steps * len(BUDGETS), shared(budget), None))
    original = family.original.report
    assert isinstance(original, Quality)
    remark = (
        f"The embedded default, perplexity {original.perplexity:.2f}; within the latency by a table of onnxruntime, batch 1, "
        f"128 tokens, one thread. {how.settings.batch_size} windows of {windows(subject.text['calibration']).shape[1]} tokens a step, of "
        f"{subject.text['calibration'].numel()} tokens; Adam at {how.settings.rate:g}. Gradually: by way of {', '.join(BUDGETS)}, {steps} "
        "steps each, which makes all of these sizes, the first as with states; in one step: that size alone, in as many steps as all of "
        "them; both with states, as the recipe has it. "
        "A row of training holds where it is closer to the original than what wasn't trained, the gradual one where it is no further "
        "than the one step. One network for all sizes: structures in the order in which they go, so that each size is the beginning of the "
        "larger ones, all of them in the same matrices; each step trains the best config for a latency that is drawn."
    )
    return Section("Recovery", ("asked for", "what", "steps", "perplexity", "KL"), rows, [remark])


def _stepped(subject: Subject, steps: int) -> Family:
    """A family with a size for each budget, trained in so many steps and pruned on."""
    output = subject.latency.parent / "stepped.family"
    wishes = {"target": "onnxruntime", "recipe": "ziplm", "latency": subject.latency, "progress": to_stderr()}
    run = prepare(recover=BUDGETS, **wishes)
    run.recipe = replace(run.recipe, recovery=subject.how(steps))
    run.run(output, restart=True, force=True)
    return Family.open(output)


def _row(budget: str, what: str, steps: int, quality: Quality, holds: bool | None) -> Row:
    kl_ = f"{quality.kl_mean:.4f} ± {quality.kl_stderr:.4f}"
    return Row((budget, what, str(steps), f"{quality.perplexity:.2f}", kl_), holds)


class Prefixes(Trainable):
    """One network whose sizes share all of their matrices: structures that a config leaves out are masked where they are read."""

    def __init__(
        self, model: PreTrainedModel, objective: Divergence, structures: Mapping[str, Structure], order: Callable[[str], Tensor]
    ) -> None:
        self.model, self.objective, self._structures = model, objective, structures
        self._places = {name: order(name).argsort() for name in structures}
        self._masks: dict[str, Tensor] = {}
        self.groups = {"numbers": dict(model.named_parameters())}
        for name in structures:
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(self._masked(name))

    def _masked(self, name: str) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        return lambda module, given: (given[0] * self._masks[name],)

    def set(self, config: Config) -> None:
        for name, structure in self._structures.items():
            kept = kept_of(config[name, structure.axis]) or 0
            self._masks[name] = (self._places[name] < kept).float().repeat_interleave(structure.size)

    def bits(self, config: Config) -> float:
        return 32.0


class Frontier(Draws):
    """The best config for a latency between two, drawn evenly in the speed-up."""

    def __init__(self, family: Family, fastest: float) -> None:
        self._solver = Solver(family.space, family.manifest.table)
        self._whole, self._fastest = family.space.costs(family.space.largest())["ms"], fastest

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        faster = np.random.default_rng([seed, step]).uniform(1, self._fastest)
        return [self._solver.solve(Budget((("ms", self._whole / faster),), ""))]


def _shared(subject: Subject, steps: int) -> Callable[[str], Quality]:
    """Sizes that share their matrices, trained in as many steps in all; the quality at a budget."""
    family, settings = subject.family, subject.how(steps).settings
    model = family.extract(family.space.largest())
    objective = Divergence(model, Reference.of(subject.original, windows(subject.text["calibration"])))
    network = Prefixes(model, objective, family._structures, family._store.order)
    train(network, Frontier(family, float(BUDGETS[-1][:-1])), settings, checkpoint={}, keep=lambda _: None, progress=to_stderr())

    def quality(budget: str) -> Quality:
        network.set(family.select(budget).config)
        return measure(model, subject.reference)

    return quality


def searched(family: Family) -> Section:
    """Weights of the layers' errors: measured or searched, and evolution from what the measured ones lead to."""
    space, table, text = _dense(family), family.manifest.table, family.text()
    original = family.extract(family.space.largest())
    report, fitting = Reference.of(original, text["report"]), Reference.of(original, text["calibration"][:NUM_FITNESS])
    network = ElasticModel(
        family.extract(family.space.largest()), space, Decoder(family._store.variant, targets.get(family.target), family.source)
    )
    known: dict[Config, float] = {}

    def fitness(config: Config) -> float:
        if config not in known:
            known[config] = kl(network.set(config), fitting)
        return known[config]

    rows, probes = [], num_probes(space.decisions)
    for asked in SEARCHED:
        budget = family.budget(asked)
        measured = Solver(space, table).solve(budget)
        found = {("measured", probes + 1): measured}
        for number in EVALUATIONS:
            settings = layer_weights.Settings(drawn=min(100, math.ceil(number * 2 / 3)), most=number)
            ranked = layer_weights.search(space, table, budget=budget, fitness=fitness, settings=settings, progress=to_stderr())
            found["searched weights", len(ranked)] = ranked[0].config
            if number > probes:
                left = number - probes
                entrants = max(1, round(math.sqrt(left)))
                evolving = Settings((Stage(fitness, entrants),), max(1, left // entrants))
                best = evolve(space, table, budget=budget, start=[measured], settings=evolving, progress=to_stderr())
                found["measured, then evolution", probes + len(best)] = best[0].config
        quality = {key: measure(network.set(config), report) for key, config in found.items()}
        for key, own in quality.items():
            name, evaluations = key
            others = [q.kl_mean for (other, spent), q in quality.items() if other == "searched weights" and spent <= 1.1 * evaluations]
            holds = None if name == "searched weights" else own.kl_mean <= min(others)
            rows.append(Row((asked, name, str(evaluations), f"{own.perplexity:.2f}", f"{own.kl_mean:.4f} ± {own.kl_stderr:.4f}"), holds))
    remark = (
        "What the errors of attentions and feed-forwards count, for the exact solver: measured, one network run for each of "
        f"{probes} disturbed modules, on the search split; or drawn, and kept where the whole network is closer to the original on "
        f"{NUM_FITNESS} segments of calibration text (SPDY, ZipLM). Evolution: as at high effort, from the measured weights' config. "
        "Evaluations are runs of a pruned network; quality is that on the report split, nothing trained. A row of ours holds where no "
        "search with up to as many evaluations (a tenth more) is better."
    )
    return Section("Measured or searched weights", ("asked for", "weights", "evaluations", "perplexity", "KL"), rows, [remark])


def _dense(family: Family) -> Space:
    """In float32 alone."""
    decisions = (replace(d, choices=tuple(c for c in d.choices if format_of(c.name) == "F32")) for d in family.space.decisions)
    return replace(family.space, decisions=tuple(decisions))
