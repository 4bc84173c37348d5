"""Correlation-guided sampling: what a few random configs lose says which units matter, and more are drawn from what is left.

Of LLM-QFA ("One QuantLLM for ALL", arXiv 2405.20202). The same measured configs serve every budget: the answer is the best of
them within it. First configs of all sizes are drawn. Then the units whose bits go most with a low loss keep their upper choices, and
more configs are drawn from the space that remains.

Differences from the paper, and why: sizes differ more than units do, so that any unit's bits go with the loss. The loss that
is correlated is therefore what remains of its logarithm when the mean bits are known, and a unit's bits are counted from the
config's mean. The paper doesn't say how configs are drawn: here with mean bits evenly spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anyfit.core.budget import Budget
from anyfit.core.config import FORMAT, Config
from anyfit.core.space import Decision, Space
from anyfit.core.tilted import Bits
from anyfit.progress import Progress
from anyfit.searchers.base import Fitness, Ranked, Searcher, Subject
from anyfit.searchers.exact import require

NUM_SEGMENTS = 16
"""Of text, that each config is measured on."""
_DEGREE = 2
"""Of the polynomial in the mean bits that foretells the logarithm of the loss."""


@dataclass(frozen=True)
class Settings:
    """Configs that are drawn `first` and `then`; the `share` of units that are taken for sensitive; `most_bits`: the largest mean."""

    first: int = 100
    then: int = 50
    share: float = 0.25
    most_bits: float = 6.0
    seed: int = 0


def explore(space: Space, fitness: Fitness, settings: Settings, progress: Progress) -> list[Ranked]:
    """Every config that was measured, the best first."""
    rng = np.random.default_rng(settings.seed)
    found: dict[Config, float] = {}
    with progress.stage("explore", settings.first + settings.then) as stage:

        def measure(decisions: Sequence[Decision], number: int) -> None:
            for config in _drawn(decisions, number, settings.most_bits, rng):
                if config not in found:
                    found[config] = fitness(config)
                stage.advance(detail=f"{found[config]:.5f}")

        measure(space.decisions, settings.first)
        measure(shrunk(space, found, settings.share), settings.then)
    return [Ranked(config, found[config]) for config in sorted(found, key=found.__getitem__)]


def best(measured: Sequence[Ranked], space: Space, budget: Budget) -> Config | None:
    """The best within a budget, of what `explore` found; None where all are larger."""
    return next((one.config for one in measured if budget.allows(space.costs(one.config))), None)


def correlations(space: Space, measured: Mapping[Config, float]) -> dict[str, float]:
    """By unit: how its bits go with the loss, sizes being equal; negative where more bits lower it."""
    known = Bits.of(space.decisions)
    places = [
        {choice.name: bits for choice, bits in zip(d.choices, own, strict=True)}
        for d, own in zip(space.decisions, known.choices, strict=True)
    ]
    bits = np.array([[place[config[d.key]] for d, place in zip(space.decisions, places, strict=True)] for config in measured])
    mean = np.average(bits, axis=1, weights=known.weights)
    losses = np.log(np.maximum(list(measured.values()), 1e-12))
    losses -= np.polyval(np.polyfit(mean, losses, _DEGREE), mean)
    own = bits - mean[:, None]
    own -= own.mean(0)
    spread = np.sqrt((own**2).sum(0) * (losses**2).sum())
    found = np.divide(losses @ own, spread, out=np.zeros(len(spread)), where=spread > 0)
    return {d.unit.name: float(value) for d, value in zip(space.decisions, found, strict=True)}


def shrunk(space: Space, measured: Mapping[Config, float], share: float) -> list[Decision]:
    """The decisions, of which a `share` at most, those whose bits go most with a low loss, keep their upper choices."""
    sensitive = _sensitive(space, measured, share)
    return [_upper(decision) if decision.unit.name in sensitive else decision for decision in space.decisions]


def _sensitive(space: Space, measured: Mapping[Config, float], share: float) -> set[str]:
    found = correlations(space, measured)
    ordered = sorted(found, key=found.__getitem__)
    return {name for name in ordered[: round(share * len(ordered))] if found[name] < 0}


def _upper(decision: Decision) -> Decision:
    """With the larger half of its choices."""
    ordered = sorted(decision.choices, key=lambda choice: choice.stored_bytes)
    return replace(decision, choices=tuple(ordered[len(ordered) // 2 :]))


def _drawn(decisions: Sequence[Decision], number: int, most_bits: float, rng: np.random.Generator) -> list[Config]:
    """Configs whose expected mean bits are evenly spread from the least to the most."""
    bits, found = Bits.of(decisions), []
    for part in np.linspace(0, 1, number):
        stated = bits.at(bits.between(float(part), max(most_bits, bits.ends[0])))
        found.append(Config({d.key: d.choices[int(rng.choice(len(d.choices), p=stated[d.key]))].name for d in decisions}))
    return found


SETTINGS = Settings()


class Correlation(Searcher):
    """One exploration for all budgets. Where all that was drawn is larger than a budget, the smallest config is left."""

    name = "correlation"

    def search(self, subject: Subject, budgets: Sequence[Budget]) -> list[Config]:
        for budget in budgets:
            require(subject.space, budget)
        measured = explore(subject.space, subject.fitness(NUM_SEGMENTS), SETTINGS, subject.progress)
        return [best(measured, subject.space, budget) or subject.space.smallest() for budget in budgets]

    def refuses(self, space: Space) -> str | None:
        return None if all(d.axis == FORMAT for d in space.decisions) else "it correlates bits, and parts are left out here"

    def num_segments(self, num_budgets: int) -> int:
        return NUM_SEGMENTS * (SETTINGS.first + SETTINGS.then)


SEARCHER = Correlation()
