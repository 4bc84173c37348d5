"""Which configs each step of training runs as."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from anyfit.core.config import Config
from anyfit.core.errors import ModelError
from anyfit.core.space import Decision
from anyfit.core.tilted import Bits, Probabilities

Evaluate = Callable[[Config], float]
"""The loss of a config on text that is always the same."""


class Expected(Protocol):
    """What units and their choices are expected to lose: a `scores.table.Table`."""

    @property
    def sensitivity(self) -> Mapping[str, float]:
        """Of each unit to an error of its outputs."""

    def score(self, unit: str, choice: str) -> float:
        """The loss that a choice brings."""


class Draws(ABC):
    """What training needs of a sampler. Draws depend on the step, the seed, and the `state`: a killed run goes on as it would have."""

    @abstractmethod
    def draws(self, step: int, seed: int) -> Sequence[Config]:
        """The configs of a step, one after another; the largest first where there are several."""

    def observe(self, step: int, evaluate: Evaluate) -> None:  # noqa: B027 (most don't)
        """Called before each step, for those that learn from how training goes."""

    def state(self) -> dict[str, Tensor]:
        """What was learnt."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 (most have none)
        """Go on from an earlier `state`; nothing where there is none."""


class Sampler(Draws):
    """States how often it draws each choice of every decision."""

    knows_losses = False
    """Whether it asks for a `table`."""

    def __init__(self, decisions: Sequence[Decision], period: int, table: Expected | None = None) -> None:
        """`period`: steps after which a schedule begins anew. `table`: what units and their choices are expected to lose."""
        self.decisions, self.period, self.table = tuple(decisions), period, table

    @abstractmethod
    def probabilities(self, step: int) -> Probabilities:
        """How often each choice is in the step's configs, decision by decision, over all seeds."""

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        return [self.draw(step, seed)]

    def draw(self, step: int, seed: int) -> Config:
        """One config; here decisions are drawn independently, as stated."""
        return self._drawn(self.probabilities(step), _generator(step, seed))

    def _drawn(self, stated: Probabilities, generator: Generator) -> Config:
        chosen = {}
        for decision in self.decisions:
            weights = torch.from_numpy(stated[decision.key])
            chosen[decision.key] = decision.choices[int(torch.multinomial(weights, 1, generator=generator))].name
        return Config(chosen)

    def _extreme(self, pick: Callable[..., int]) -> Config:
        """The largest or the smallest choice everywhere."""
        return Config({decision.key: decision.choices[_extreme(decision, pick)].name for decision in self.decisions})

    def _certain(self, key: tuple[str, str], pick: Callable[..., int]) -> NDArray[np.float64]:
        """All for the largest or the smallest choice of one decision."""
        decision = next(decision for decision in self.decisions if decision.key == key)
        found = np.zeros(len(decision.choices))
        found[_extreme(decision, pick)] = 1
        return found


class Uniform(Sampler):
    """Every choice alike. The mean over many decisions hardly ever leaves the middle."""

    def probabilities(self, step: int) -> Probabilities:
        return {d.key: np.full(len(d.choices), 1 / len(d.choices)) for d in self.decisions}


class Sandwich(Sampler):
    """Of universally slimmable networks (arXiv 1903.05134): the largest, the smallest, and one between them in every step."""

    def probabilities(self, step: int) -> Probabilities:
        between = Uniform(self.decisions, self.period).probabilities(step)
        return {key: (self._certain(key, max) + self._certain(key, min) + own) / 3 for key, own in between.items()}

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        return [self._extreme(max), self._extreme(min), Uniform(self.decisions, self.period).draw(step, seed)]


class EverySize(Sampler):
    """Each step runs once at each size, the same everywhere, from the largest on."""

    def probabilities(self, step: int) -> Probabilities:
        found = {}
        for decision in self.decisions:
            picked = [_at(decision, part) for part in self._parts()]
            found[decision.key] = np.bincount(picked, minlength=len(decision.choices)) / len(picked)
        return found

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        return [Config({d.key: d.choices[_at(d, part)].name for d in self.decisions}) for part in self._parts()]

    def _parts(self) -> list[float]:
        """Of the way from the smallest size to the largest, from that on."""
        most = max(len(decision.choices) for decision in self.decisions)
        return [place / max(1, most - 1) for place in reversed(range(most))]


class HessianAware(EverySize):
    """HASB of Double Rounding (arXiv 2502.01199): a step runs once at each size, where with a growing probability a unit draws for itself.

    Units that are less sensitive than the mean draw any choice; the others choices in proportion to their bits. The largest and the
    smallest size are always among the configs as they are. `period` is the time in which the probability grows to `MOST`.
    """

    MOST = 0.5
    knows_losses = True

    def probabilities(self, step: int) -> Probabilities:
        share, parts, found = self._share(step), self._parts()[1:-1], {}
        for decision, own in zip(self.decisions, self._own(), strict=True):
            total = self._certain(decision.key, max) + self._certain(decision.key, min)
            for part in parts:
                base = np.zeros(len(own))
                base[_at(decision, part)] = 1
                total = total + (1 - share) * base + share * own
            found[decision.key] = total / (2 + len(parts))
        return found

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        generator = _generator(step, seed)
        between = [self._mixed(step, part, generator) for part in self._parts()[1:-1]]
        return [self._extreme(max), *between, self._extreme(min)]

    def _mixed(self, step: int, part: float, generator: Generator) -> Config:
        """The size that is `part` of the way up, but for the units that draw for themselves."""
        chosen = {}
        for decision, own in zip(self.decisions, self._own(), strict=True):
            pick = _at(decision, part)
            if float(torch.rand(1, generator=generator)) < self._share(step):
                pick = int(torch.multinomial(torch.from_numpy(own), 1, generator=generator))
            chosen[decision.key] = decision.choices[pick].name
        return Config(chosen)

    def _share(self, step: int) -> float:
        return self.MOST * min(1.0, (step + 1) / self.period)

    def _own(self) -> list[NDArray[np.float64]]:
        assert self.table is not None, "this sampler needs the units' sensitivity"
        sensitivity = self.table.sensitivity
        mean = float(np.mean([sensitivity[d.unit.name] for d in self.decisions]))
        found = []
        for decision in self.decisions:
            bits = np.array([float(choice.stored_bytes) for choice in decision.choices])
            alike = sensitivity[decision.unit.name] < mean
            found.append(np.full(len(bits), 1 / len(bits)) if alike else bits / bits.sum())
        return found


class Balanced(Sampler):
    """The resource-balanced schedule of LLM-QFA: over a `period`, the mean bits go from the most to the least and back.

    As printed, the paper's triangle wave lacks its lower end; here it is b_1 + (b_N - b_1) |2 (t mod S) / S - 1|. How choices
    follow from the mean isn't in the paper: here p(b) is in proportion to exp(theta b), with theta such that the mean is met.
    """

    def __init__(self, decisions: Sequence[Decision], period: int, table: Expected | None = None) -> None:
        super().__init__(decisions, period, table)
        self._bits = Bits.of(self.decisions)
        self._known: dict[int, Probabilities] = {}

    def target(self, step: int) -> float:
        """Mean stored bits per weight at this step."""
        return self._bits.between(abs(2 * (step % self.period) / self.period - 1))

    def probabilities(self, step: int) -> Probabilities:
        place = step % self.period
        if place not in self._known:
            self._known[place] = self._at(self.target(step))
        return self._known[place]

    def _at(self, target: float) -> Probabilities:
        """With this mean."""
        return self._bits.at(target)


class Frontier(Balanced):
    """The balanced schedule along the configs that are asked for: at each mean the one that is expected to lose least.

    Drawn by a tilt alone, neighbours differ more than they ever will in use, and a fine variant learns to make up for the errors of
    coarse ones: drawn uniformly, four bits end up worse than untrained. Here units take choices in the order of what a bit more brings
    them, and a share `EVEN` of draws follows the tilt, so that every choice is trained. Of all draws shares `LEAST` and `MOST` are the
    smallest and the largest config, which along the frontier are met at the turns alone. The smallest has the most to gain, and a variant
    there has to do with the errors of all others; in the largest it has to do with none, as nowhere else.
    """

    EVEN, LEAST, MOST = 0.1, 0.2, 0.15
    knows_losses = True

    def probabilities(self, step: int) -> Probabilities:
        along = 1 - self.LEAST - self.MOST
        return {
            key: along * own + self.LEAST * self._certain(key, min) + self.MOST * self._certain(key, max)
            for key, own in self.along(step).items()
        }

    def along(self, step: int) -> Probabilities:
        """Of the draws along the frontier, whose mean is the target."""
        return super().probabilities(step)

    def draw(self, step: int, seed: int) -> Config:
        generator = _generator(step, seed)
        place = float(torch.rand(1, generator=generator))
        if place < self.LEAST:
            return self._extreme(min)
        return self._extreme(max) if place < self.LEAST + self.MOST else self._drawn(self.along(step), generator)

    def _at(self, target: float) -> Probabilities:
        best, tilted = self._best(target), self._bits.at(target)
        return {key: (1 - self.EVEN) * own + self.EVEN * tilted[key] for key, own in best.items()}

    def _best(self, target: float) -> dict[tuple[str, str], NDArray[np.float64]]:
        """All for the least expected loss at this mean; the unit that the mean falls into is divided between two choices."""
        assert self.table is not None, "this sampler needs what choices are expected to lose"
        steps, found, missing = [], dict[tuple[str, str], NDArray[np.float64]](), target * self._bits.weights.sum()
        for decision, bits, weights in zip(self.decisions, self._bits.choices, self._bits.weights, strict=True):
            losses = np.array([self.table.score(decision.unit.name, choice.name) for choice in decision.choices])
            hull = _hull(bits * weights, losses)
            found[decision.key] = np.eye(len(bits))[hull[0]]
            missing -= bits[hull[0]] * weights
            for low, high in pairwise(hull):
                more = (bits[high] - bits[low]) * weights
                steps.append(((losses[low] - losses[high]) / more, more, decision.key, low, high))
        for _, more, key, low, high in sorted(steps, key=lambda step: -step[0]):
            part = min(max(missing / more, 0.0), 1.0)
            found[key][low], found[key][high] = found[key][low] - part, found[key][high] + part
            missing -= part * more
        return found


class Shifted(Sampler):
    """ShiftNAS (arXiv 2307.08300): sizes whose loss still falls are trained more.

    The range of mean bits is cut into bins. Each `INTERVAL` steps the loss of one config in each bin is measured, always the same one; bins
    are then drawn with probabilities in proportion to exp(average fall / `TEMPERATURE` of the largest), mixed with `EVEN` of all
    alike. Differs from the paper: it learns the distribution and a generator of configs by gradients; here the difference between two
    snapshots, which is its gradient's estimate, is used as it is, and configs of a bin are drawn as in `Balanced`.
    """

    BINS, INTERVAL, KEPT, TEMPERATURE, EVEN = 8, 25, 0.5, 0.5, 0.2

    def __init__(self, decisions: Sequence[Decision], period: int, table: Expected | None = None) -> None:
        super().__init__(decisions, period, table)
        bits = Bits.of(self.decisions)
        self._in_bin = [bits.at(bits.between((number + 0.5) / self.BINS)) for number in range(self.BINS)]
        self._probes = [self._drawn(stated, _generator(number, -1)) for number, stated in enumerate(self._in_bin)]
        self._last, self._fall = np.full(self.BINS, np.nan), np.full(self.BINS, np.nan)

    def observe(self, step: int, evaluate: Evaluate) -> None:
        if step % self.INTERVAL:
            return
        losses = np.array([evaluate(config) for config in self._probes])
        if not np.isfinite(losses).all():
            raise ModelError("Training went astray: losses aren't finite.", remedy="Check the original, or take --recipe gptq.")
        fall = self._last - losses
        self._fall = np.where(np.isnan(self._fall), fall, self.KEPT * self._fall + (1 - self.KEPT) * fall)
        self._last = losses

    @property
    def bins(self) -> NDArray[np.float64]:
        """The probability of each bin, from the least bits to the most."""
        alike = np.full(self.BINS, 1 / self.BINS)
        largest = np.abs(self._fall).max()
        if not largest > 0:  # nothing is known yet
            return alike
        shifted = np.exp(self._fall / (self.TEMPERATURE * largest))
        return self.EVEN * alike + (1 - self.EVEN) * shifted / shifted.sum()

    def probabilities(self, step: int) -> Probabilities:
        return {d.key: sum(p * stated[d.key] for p, stated in zip(self.bins, self._in_bin, strict=True)) for d in self.decisions}

    def draw(self, step: int, seed: int) -> Config:
        generator = _generator(step, seed)
        number = int(torch.multinomial(torch.from_numpy(self.bins), 1, generator=generator))
        return self._drawn(self._in_bin[number], generator)

    def state(self) -> dict[str, Tensor]:
        return {"last": torch.from_numpy(self._last.copy()), "fall": torch.from_numpy(self._fall.copy())}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            return
        self._last, self._fall = state["last"].numpy().copy(), state["fall"].numpy().copy()


def _hull(sizes: NDArray[np.float64], losses: NDArray[np.float64]) -> list[int]:
    """Places of the choices that are best at some price of a bit, from the smallest on: each step brings less than the one before."""
    found: list[int] = []
    for index in np.lexsort((losses, sizes)):
        if found and losses[index] >= losses[found[-1]]:
            continue
        while len(found) > 1 and _gain(found[-2:], sizes, losses) <= _gain([found[-1], index], sizes, losses):
            found.pop()
        found.append(int(index))
    return found


def _gain(places: Sequence[int], sizes: NDArray[np.float64], losses: NDArray[np.float64]) -> float:
    """What a bit more brings between two choices."""
    low, high = places
    return float((losses[low] - losses[high]) / (sizes[high] - sizes[low]))


def _at(decision: Decision, part: float) -> int:
    """The choice that is `part` of the way from the smallest to the largest."""
    ordered = sorted(range(len(decision.choices)), key=lambda index: decision.choices[index].stored_bytes)
    return ordered[round(part * (len(ordered) - 1))]


def _extreme(decision: Decision, pick: Callable[..., int]) -> int:
    return pick(range(len(decision.choices)), key=lambda index: decision.choices[index].stored_bytes)


def _generator(step: int, seed: int) -> Generator:
    return Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
