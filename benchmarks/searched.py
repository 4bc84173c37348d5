"""Which searcher finds the best configs of a network that was trained once: as many evaluations for each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np
from allocation import blind
from table import Row, Section

from anyfit.api import prepare
from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.space import Space
from anyfit.core.tilted import Bits
from anyfit.elastic.model import ElasticModel
from anyfit.family.store import Store
from anyfit.pipeline import NUM_PROBE_SEGMENTS, Fit
from anyfit.progress import Progress, Silent
from anyfit.scores.kl import num_probes
from anyfit.scores.table import Table
from anyfit.searchers import correlation, evolution
from anyfit.searchers.exact import Solver
from anyfit.tasks.language import Reference, kl
from anyfit.training import trained

BITS = (2.25, 2.5, 3.0, 3.5)
"""Of the integers; their scales and offsets take one more."""
MIN_BITS = 2
SEEDS = (0, 1, 2)
THEN = 3
"""One evaluation in so many is of a config drawn when something is known, for correlation-guided sampling; the paper's."""
BACKWARD = 3
"""Evaluations that a pass forward and backward takes the time of."""
ENTRANTS = 6
"""Offspring in a generation of evolution."""
NEAR = 0.02
"""Bits, that a random config may be below the budget."""
TRIES = 2000
"""Of a draw, before a size is left with fewer."""
TABLE, EVOLVED, CORRELATED, CORRELATED_AT, RANDOM = (
    "exact, by the table",
    "evolution",
    "correlation-guided, all sizes at once",
    "correlation-guided, at this size",
    "random, at this size",
)
HEADER = ("bits", "searcher", "evaluations", "bits of the config", "KL, search split", "KL", "least and most of the seeds", "against exact")


@dataclass
class Trained:
    """The embedded default after the one run of a recipe, as a fit has it before it searches.

    `space`: of what was trained alone, without what stays; `names` of the choices, the smallest first.
    """

    run: Fit
    table: Table
    names: tuple[str, ...]
    elastic: ElasticModel
    spent: int = 0
    """Evaluations so far."""
    _searched: dict[Config, float] = field(default_factory=dict)
    _held_out: dict[Config, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Fit, store: Store, names: tuple[str, ...]) -> Trained:
        run.encode(store)
        run.train(store)
        return cls(run, run.score(store), names, run.elastic_model(store))

    @cached_property
    def space(self) -> Space:
        decisions = trained(self.run.space)
        return Space(decisions, 0, 0, sum(decision.unit.num_weights for decision in decisions))

    @cached_property
    def _search(self) -> Reference:
        return Reference.of(self.run.model, self.run.segments.search[:NUM_PROBE_SEGMENTS])

    @cached_property
    def _report(self) -> list[Reference]:
        return [Reference.of(self.run.model, segment[None]) for segment in self.run.segments.report]

    @property
    def evaluations(self) -> int:
        """What the table took of the search split: a network for each probe, a backward pass, and each format before and after training."""
        gains = 2 * len(self.names) * len(self.run.segments.search) // NUM_PROBE_SEGMENTS
        return num_probes(self.space.decisions) + BACKWARD + gains

    @cached_property
    def scales(self) -> float:
        """Bits of a weight beside its integer's."""
        decision = self.space.decisions[0]
        return 8 * decision.choice(self.names[0]).stored_bytes / decision.unit.num_weights - MIN_BITS

    def budget(self, bits: float) -> Budget:
        """`bits`: of the integers."""
        return Budget((("bits", bits + self.scales),), f"{bits:g} bits")

    def fitness(self, config: Config) -> float:
        """KL on the text that the table's probes were measured on. Counted."""
        self.spent += 1
        return self.searched(config)

    def searched(self, config: Config) -> float:
        """The same, measured once, not counted."""
        if config not in self._searched:
            self._searched[config] = self._kl(config, self._search)
        return self._searched[config]

    def held_out(self, config: Config) -> np.ndarray:
        """KL on each segment of the report split."""
        if config not in self._held_out:
            self._held_out[config] = np.array([self._kl(config, segment) for segment in self._report])
        return self._held_out[config]

    def _kl(self, config: Config, text: Reference) -> float:
        return kl(self.elastic.set(Config({**self.run.space.largest(), **config})), text)


Search = Callable[[Trained, Sequence[Budget], int], list[Config]]
"""A config for each budget, with a seed."""


def exact(subject: Trained, budgets: Sequence[Budget], _: int) -> list[Config]:
    solver = Solver(subject.space, subject.table)
    return [solver.solve(budget) for budget in budgets]


def evolved(subject: Trained, budgets: Sequence[Budget], seed: int) -> list[Config]:
    """From what is best where a bit more quarters each weight's error, with nothing measured but what it measures itself."""
    table, found = blind(subject.space), list[Config]()
    stages = (evolution.Stage(subject.fitness, ENTRANTS),)
    settings = evolution.Settings(stages, (subject.evaluations - 1) // ENTRANTS, seed)
    for budget in budgets:
        start = [Solver(subject.space, table).solve(budget)]
        ranked = evolution.evolve(subject.space, table, budget=budget, start=start, settings=settings, progress=Silent())
        found.append(ranked[0].config)
    return found


def correlated(subject: Trained, budgets: Sequence[Budget], seed: int) -> list[Config]:
    """As LLM-QFA has it: all configs serve all budgets."""
    number = len(budgets) * subject.evaluations
    most = max(bound for budget in budgets for _, bound in budget.limits)
    settings = correlation.Settings(first=number - number // THEN, then=number // THEN, most_bits=most, seed=seed)
    measured = correlation.explore(subject.space, subject.fitness, settings, Silent())
    return [correlation.best(measured, subject.space, budget) or subject.space.smallest() for budget in budgets]


def correlated_at(subject: Trained, budgets: Sequence[Budget], seed: int) -> list[Config]:
    """With the same random configs as below, but for the last third, drawn from the space that these shrink."""
    space, then, found = subject.space, subject.evaluations // THEN, list[Config]()
    for budget in budgets:
        measured = {c: subject.fitness(c) for c in _random(space, budget, subject.evaluations - then, seed)}
        left = replace(space, decisions=tuple(correlation.shrunk(space, measured, correlation.SETTINGS.share)))
        measured |= {c: subject.fitness(c) for c in _random(left, budget, then, seed)}
        found.append(min(measured, key=measured.__getitem__))
    return found


def drawn(subject: Trained, budgets: Sequence[Budget], seed: int) -> list[Config]:
    return [min(_random(subject.space, budget, subject.evaluations, seed), key=subject.fitness) for budget in budgets]


def _random(space: Space, budget: Budget, number: int, seed: int) -> list[Config]:
    """Different configs just within a budget of bits, drawn alike for all units with that mean; fewer where hardly any are there."""
    ((_, most),) = budget.limits
    rng, found, tries = np.random.default_rng(seed), dict[Config, None](), number * TRIES
    stated = Bits.of(space.decisions).at(most)
    names = [[choice.name for choice in d.choices] for d in space.decisions]
    while len(found) < number and (tries := tries - 1):
        drawn = [own[int(rng.choice(len(own), p=stated[d.key]))] for d, own in zip(space.decisions, names, strict=True)]
        config = Config({d.key: name for d, name in zip(space.decisions, drawn, strict=True)})
        if most - NEAR <= space.bits(config) <= most:
            found[config] = None
    return list(found)


SEARCHES: dict[str, tuple[Search, Sequence[int]]] = {
    TABLE: (exact, SEEDS[:1]),
    EVOLVED: (evolved, SEEDS),
    CORRELATED: (correlated, SEEDS),
    CORRELATED_AT: (correlated_at, SEEDS),
    RANDOM: (drawn, SEEDS),
}


def section(formats: tuple[str, ...], rest: str, segments: int, steps: int, progress: Progress) -> Section:
    """`formats` to train, the smallest first; everything else has `rest`."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(target="transformers", formats=(rest, *formats), recipe="llm-qfa", segments=segments, device="cpu", progress=progress)
        how = run.recipe.training
        assert how is not None
        run.recipe = replace(run.recipe, training=replace(how, settings=replace(how.settings, num_steps=steps)))
        subject = Trained.of(run, Store(Path(folder)), formats)
        return Section("Search after training", HEADER, list(_rows(subject)), (_remark(subject, steps),))


def _rows(subject: Trained) -> Iterator[Row]:
    budgets, spent = [subject.budget(bits) for bits in BITS], dict[str, int]()
    found = dict[str, list[list[Config]]]()
    for name, (search, seeds) in SEARCHES.items():
        subject.spent = 0
        found[name] = [search(subject, budgets, seed) for seed in seeds]
        spent[name] = round(subject.spent / len(seeds) / len(budgets)) or subject.evaluations
        print(name, subject.spent, flush=True)
        assert spent[name] <= subject.evaluations, name
    for place, (bits, budget) in enumerate(zip(BITS, budgets, strict=True)):
        best = {name: _middle(subject, [configs[place] for configs in runs]) for name, runs in found.items()}
        reference, chance = subject.held_out(best[TABLE]), subject.held_out(best[RANDOM]).mean()
        for name, config in best.items():
            assert budget.allows(subject.space.costs(config))
            own, all_ = subject.held_out(config), [subject.held_out(configs[place]).mean() for configs in found[name]]
            difference = own - reference
            error = difference.std(ddof=1) / np.sqrt(len(own))
            change = f"{own.mean() / reference.mean() - 1:+.1%} ± {error / reference.mean():.1%}"
            ends = f"{min(all_):.5f} to {max(all_):.5f}" if len(all_) > 1 else ""
            size, searched = subject.space.bits(config) - subject.scales, subject.searched(config)
            cells = (f"{bits:g}", name, f"{spent[name]}", f"{size:.3f}", f"{searched:.5f}", f"{own.mean():.5f}", ends)
            cells += ("" if name == TABLE else change,)
            print("  ".join(cells), flush=True)
            guided = bool(own.mean() <= chance)
            claims = {TABLE: None, CORRELATED: guided, CORRELATED_AT: guided}
            yield Row(cells, claims.get(name, bool(difference.mean() >= -2 * error)))


def _middle(subject: Trained, configs: Sequence[Config]) -> Config:
    """The one of median KL on the report split."""
    losses = {config: float(subject.held_out(config).mean()) for config in configs}
    middle = median(losses[config] for config in configs)
    return min(configs, key=lambda config: abs(losses[config] - middle))


def _remark(subject: Trained, steps: int) -> str:
    probes, segments = num_probes(subject.space.decisions), len(subject.run.segments.search)
    return (
        f"After {steps} steps of `--recipe llm-qfa`, which train {', '.join(subject.names)}; everything else stays as it is. KL to the "
        f"original, and bits as above. An evaluation is one network on {NUM_PROBE_SEGMENTS} segments of the search split. The table of the "
        f"exact search, which serves all sizes, took {subject.evaluations}: {probes} probes, a pass forward and backward, which is as much "
        f"as {BACKWARD}, and what each format gained, before and after on {segments} segments. The others have as many for each size. "
        f"Evolution starts from what would be best if a bit more quartered each weight's error, with {ENTRANTS} offspring a generation. "
        f"Correlation-guided sampling draws one config in {THEN} when it knows which matrices matter; for all sizes at once, as in the "
        "paper, what it measures serves all of them. At one size, it and random draws have mean bits at most "
        f"{NEAR:g} below the budget's. What chance decides was done with {len(SEEDS)} seeds: figures are of the one of median KL on the "
        "report split, errors of paired differences over segments. Evolution and random draws hold where the exact search isn't worse than "
        "they by more than two standard errors, correlation-guided sampling where it is at or below random draws."
    )
