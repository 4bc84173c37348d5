"""Who gets the bits: searchers on the embedded default, from one format for all units to evolution.

Every searcher sees the search split only; what its config loses is then measured on the report split, segment by
segment, so that differences between configs have a standard error of their own. One pass is one config measured on
one segment of the search split: what a searcher costs, wherever it runs.

    python benchmarks/allocation.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from table import Row, Section, finish_page

from anyfit.api import prepare
from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.elastic.model import ElasticModel
from anyfit.elastic.stream import ElasticStream
from anyfit.family.store import Store
from anyfit.pipeline import Fit
from anyfit.progress import Silent
from anyfit.scores import sensitivities
from anyfit.scores.table import Table
from anyfit.searchers import correlation
from anyfit.searchers.base import Fitness, Ranked
from anyfit.searchers.evolution import Settings, Stage, evolve
from anyfit.searchers.exact import Solver
from anyfit.tasks.language import Reference, kl

FORMATS = ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_NL", "Q3_K", "Q2_K")
BITS = (2.75, 3.0, 3.5, 4.0, 5.0)
LOWEST_GAIN = {3.0: 0.15, 4.0: 0.15}
"""By bits: how much lower the exact optimum's KL must be than the line through the uniform settings, at its own bits."""
LOWEST_GAIN_AT = {"Q3_K": 0.15, "Q4_K": 0.15}
"""By format: how much lower the exact optimum's KL must be than that of this format everywhere, at its very size."""
EXACT, EVOLVED = "exact, KL score", "evolution from exact"
CLEARLY, LEAST = 1.5, 0.1
"""`around` steps to errors that differ by this factor, and lowers no sensitivity further than to this share."""
FEW, SOME, ALL = 2, 8, 16
"""Segments of the search split: offspring are sorted on few, sensitivities measured on some, parents chosen on all."""
ENTRANTS, GENERATIONS = (16, 3), 5
EXPLORED = correlation.Settings(most_bits=1.2 * max(BITS))
NUM_BUDGETS, NUM_UNITS, NUM_CHOICES, SLOWEST_FRONTIER = 64, 200, 14, 1.0
REMARKS = (
    f"`below the uniform line`: how much lower than the KL of the uniform settings, its logarithm interpolated at the config's own bits. "
    f'`against exact`: the change from the row "{EXACT}", its error from the paired differences. Formats: {", ".join(FORMATS)}.',
    f"Sensitivities are measured on {SOME} segments of the search split, {EXACT!r} and what starts from it use them; evolution sorts "
    f"{ENTRANTS[0]} offspring a generation on {FEW} segments and the best {ENTRANTS[1]} of them on {ALL}, for {GENERATIONS} generations. "
    f"`passes`: configs times segments, beyond the table. Correlation-guided sampling (LLM-QFA) measures {EXPLORED.first + EXPLORED.then} "
    f"configs on {ALL} segments once for all budgets, {ALL * (EXPLORED.first + EXPLORED.then) // len(BITS)} passes for each of them.",
    "Claimed: the exact optimum is below the uniform line by "
    + ", ".join(f"{gain:.0%} at {bits:g} bits" for bits, gain in LOWEST_GAIN.items())
    + "; evolution from it isn't worse by more than two standard errors on text that it hasn't seen.",
)


@dataclass
class Bench:
    """The embedded default, encoded, with what is measured on it."""

    fit: Fit
    streamed: ElasticStream
    elastic: ElasticModel
    errors: dict[str, dict[str, float]]
    report: list[Reference]
    passes: int = 0
    explored: list[Ranked] = field(default_factory=list)
    """What correlation-guided sampling measured, once for all budgets."""
    _references: dict[int, Reference] = field(default_factory=dict)

    @classmethod
    def of(cls, fit: Fit, store: Store) -> Bench:
        report = [Reference.of(fit.model, segment[None]) for segment in fit.segments.report]
        return cls(fit, fit.elastic(store), fit.elastic_model(store), fit.errors(store), report)

    def fitness(self, num_segments: int) -> Fitness:
        """KL on the first segments of the search split."""
        if num_segments not in self._references:
            self._references[num_segments] = Reference.of(self.fit.model, self.fit.segments.search[:num_segments])

        def measured(config: Config) -> float:
            self.passes += num_segments
            return kl(self.elastic.set(config), self._references[num_segments])

        return measured

    def held_out(self, config: Config) -> np.ndarray:
        """KL on each segment of the report split."""
        model = self.elastic.set(config)
        return np.array([kl(model, segment) for segment in self.report])

    def table(self, score: str) -> Table:
        """The additive table with this score's sensitivities."""
        found = sensitivities.get(score).measure(self.streamed, self.fit.segments.search[:SOME], self.errors, Silent())
        return Table(found, self.errors)

    def uniform(self, budget: Budget) -> Config:
        """The one that measures best within the budget, or the smallest."""
        space = self.fit.space
        within = [config for config in map(space.uniform, space.formats()) if budget.allows(space.costs(config))]
        return min(within or [space.smallest()], key=self.fitness(ALL))


def blind(space: Space) -> Table:
    """What is known without any measurement: a bit more quarters the error of each weight."""
    errors = {
        d.unit.name: {c.name: d.unit.num_weights * 4.0 ** (-8 * c.stored_bytes / d.unit.num_weights) for c in d.choices}
        for d in space.decisions
    }
    return Table(dict.fromkeys(errors, 1.0), errors)


def around(bench: Bench, table: Table, config: Config) -> Table:
    """`table` with sensitivities measured around `config`: what a step changes in fitness, per change of its error.

    The step is to the next choice that is clearly rougher, as that changes most; without one, clearly finer.
    """
    fitness, found = bench.fitness(SOME), dict(table.sensitivity)
    here = fitness(config)
    for decision in bench.fit.space.decisions:
        errors = table.errors[decision.unit.name]
        own = errors[config[decision.key]]
        rougher = [(error, name) for name, error in errors.items() if error > CLEARLY * own]
        finer = [(error, name) for name, error in errors.items() if CLEARLY * error < own]
        error, step = min(rougher) if rougher else max(finer)
        changed = fitness(Config({**config, decision.key: step})) - here
        # A measured gain from a rougher choice is luck, or another unit's.
        found[decision.unit.name] = max(changed / (error - own), LEAST * found[decision.unit.name])
    return Table(found, table.errors)


def searchers(bench: Bench, tables: dict[str, Table], budget: Budget) -> Iterator[tuple[str, Callable[[], Config]]]:
    """By name, each ready to run. Those that start from the exact optimum solve it again: it takes no time."""
    space = bench.fit.space
    stages = tuple(Stage(bench.fitness(n), entrants) for n, entrants in zip((FEW, ALL), ENTRANTS, strict=True))

    def exact(score: str) -> Config:
        return Solver(space, tables[score]).solve(budget)

    def evolved(table: Table, start: Config) -> Config:
        settings = Settings(stages, GENERATIONS)
        return evolve(space, table, budget=budget, start=[start], settings=settings, progress=Silent())[0].config

    def again() -> Config:
        return Solver(space, around(bench, tables["kl"], exact("kl"))).solve(budget)

    yield "best uniform", lambda: bench.uniform(budget)
    yield "exact, Fisher score", lambda: exact("fisher")
    yield EXACT, lambda: exact("kl")
    yield "exact, measured again around it", again
    yield "evolution from uniform, no table", lambda: evolved(blind(space), bench.uniform(budget))
    yield EVOLVED, lambda: evolved(tables["kl"], exact("kl"))
    yield "correlation-guided, no table", lambda: correlation.best(bench.explored, space, budget) or space.smallest()


def allocation(bench: Bench, tables: dict[str, Table], line: tuple[np.ndarray, np.ndarray]) -> Iterator[Row]:
    """`line`: bits and logarithm of the KL of the uniform settings."""
    space, search = bench.fit.space, bench.fitness(ALL)
    for bits in BITS:
        budget = Budget((("bits", bits),), f"{bits} bits")
        exact: np.ndarray | None = None
        for name, run in searchers(bench, tables, budget):
            bench.passes, began = 0, time.perf_counter()
            config = run()
            seconds, passes = time.perf_counter() - began, bench.passes
            own = bench.held_out(config)
            exact = own if name == EXACT else exact
            below = 1 - own.mean() / float(np.exp(np.interp(space.bits(config), *line)))
            change, error = (0.0, 0.0) if exact is None else _change(own, exact)
            cells = (
                f"{bits:g}", name, f"{space.bits(config):.3f}", f"{search(config):.5f}", _mean(own), f"{below:.1%}",
                "" if exact is None or name == EXACT else f"{change:+.1%} ± {error:.1%}", f"{passes}", f"{seconds:.1f}",
            )  # fmt: skip
            print("  ".join(cells), flush=True)
            claims = {EXACT: below >= LOWEST_GAIN[bits] if bits in LOWEST_GAIN else None, EVOLVED: change <= 2 * error}
            yield Row(cells, claims.get(name))


def against_uniform(bench: Bench, table: Table) -> Iterator[tuple[Row, float, float]]:
    """Each uniform setting that isn't the original and the exact optimum of its very size; with them, its bits and KL."""
    space = bench.fit.space
    solver = Solver(space, table)
    for format_ in space.formats():
        uniform = space.uniform(format_)
        costs = space.costs(uniform)
        mixed = solver.solve(Budget(tuple(costs.items()), format_))
        theirs, ours = bench.held_out(uniform), bench.held_out(mixed)
        if not theirs.any():
            continue
        change, error = _change(ours, theirs)
        cells = (format_, f"{costs['bits']:.3f}", _mean(theirs), _mean(ours), f"{-change:.1%} ± {error:.1%}")
        print("  ".join(cells), flush=True)
        holds = bool(-change >= LOWEST_GAIN_AT[format_]) if format_ in LOWEST_GAIN_AT else None
        yield Row(cells, holds), costs["bits"], float(theirs.mean())


def _change(own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Relative difference of the means over segments, and its standard error from the paired differences."""
    return float(own.mean() / other.mean() - 1), _stderr(own - other) / float(other.mean())


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.5f} ± {_stderr(values):.5f}"


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def made_up(rng: np.random.Generator) -> tuple[Space, Table]:
    """A space as large as they come: units of many sizes, formats of many."""
    decisions, errors = [], {}
    for i in range(NUM_UNITS):
        weight = Weight(f"unit{i}.weight", (int(rng.integers(1, 9)) * 512, 4096), "q", None)
        bits = np.sort(rng.uniform(2, 16, NUM_CHOICES))
        sizes = {f"f{j}": int(b * weight.num_weights / 8) for j, b in enumerate(bits)}
        decisions.append(Decision(Unit(f"unit{i}", (weight,)), tuple(Choice(name, 32 * -(-s // 32), s) for name, s in sizes.items())))
        errors[f"unit{i}"] = {f"f{j}": float(weight.num_weights * 4**-b * rng.lognormal(0, 0.3)) for j, b in enumerate(bits)}
    table = Table({unit: float(rng.lognormal(0, 1.5)) for unit in errors}, errors)
    return Space(tuple(decisions), 10**6, 10**5, sum(d.unit.num_weights for d in decisions)), table


def frontier() -> Row:
    """The time of a whole frontier, the preparation included."""
    space, table = made_up(np.random.default_rng(0))
    sizes = np.geomspace(space.bytes_(space.smallest()), space.bytes_(space.largest()), NUM_BUDGETS)
    began = time.perf_counter()
    solver = Solver(space, table)
    for size in sizes:
        solver.solve(Budget((("bytes", float(size)),), f"{size:.0f} B"))
    seconds = time.perf_counter() - began
    return Row((str(NUM_UNITS), str(NUM_CHOICES), str(NUM_BUDGETS), f"{seconds:.2f}"), holds=seconds < SLOWEST_FRONTIER)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    fit = prepare(formats=FORMATS)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        fit.encode(store)
        bench = Bench.of(fit, store)
        tables = {name: bench.table(name) for name in sensitivities}
        uniform, bits, divergence = zip(*against_uniform(bench, tables["kl"]), strict=True)
        bench.explored = correlation.explore(fit.space, bench.fitness(ALL), EXPLORED, Silent())
        rows = list(allocation(bench, tables, (np.array(bits), np.log(divergence))))
    sections = [
        Section(
            "One format everywhere, and the exact optimum of the same size",
            ("format", "bits", "KL uniform", "KL mixed", "lower by"),
            uniform,
            ("Mean KL to the original in nats per token on the report split, ± standard error over segments; differences are paired.",),
        ),
        Section(
            "Searchers",
            ("budget", "searcher", "bits", "KL search", "KL held out", "below the uniform line", "against exact", "passes", "seconds"),
            rows,
            REMARKS,
        ),
        Section("A whole frontier of a made-up space", ("units", "choices", "budgets", "seconds"), [frontier()]),
    ]
    return finish_page("allocation", "Who gets the bits", "make bench-allocation", sections)


if __name__ == "__main__":
    sys.exit(main())
