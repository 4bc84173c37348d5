"""One run that trains every size, against runs that train one size each.

All start from the same GPTQ variants in 2, 3 and 4 bits with trainable offsets, on the embedded default. A run for one size
trains that size alone; between sizes, separate runs are stitched: each matrix from the run of its bits.

Besides: one stored tensor of integers a layer, run at several sizes, and one store of them for a language model (Double Rounding), codes
of two bits, tuned (PV-Tuning), and nested codebooks, which need no training (Any-Precision LLM).

    python benchmarks/train_once.py [--assets FOLDER] [--only SECTION]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import nested_integers
import nested_tables
import searched
import sharded
import storages
import subspace
import switching
import torch
from peers.results import evaluate, perplexity_rise
from table import Row, Section, finish_page
from texts import reported
from torch.func import functional_call
from transformers import PreTrainedModel

from anyfit.api import prepare
from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.space import Decision, Space
from anyfit.elastic.linear import ElasticNetwork, GridVariant, Variant
from anyfit.family.store import Store, stored_matrices
from anyfit.pipeline import Fit
from anyfit.progress import Progress, to_stderr
from anyfit.recipes import llm_qfa
from anyfit.scores.table import Table
from anyfit.searchers.exact import Solver
from anyfit.tasks.language import Quality, Reference, kl
from anyfit.trainers import samplers
from anyfit.trainers.decoupled import Decoupled
from anyfit.trainers.loop import Settings, train
from anyfit.trainers.losses import Divergence
from anyfit.training import stored_choices, trained, uniform
from anyfit.tuning.coded import taken
from anyfit.tuning.refining import windows

FORMATS, REST = ("int2_offset", "int3_offset", "int4_offset"), "int8_asym"
BITS = (2.0, 2.5, 3.0, 3.5, 4.0)
"""Of the integers; their scales and offsets take one more."""
SEGMENTS, STEPS = 1024, 400
WITHIN = 0.02
"""Of the perplexity of runs with as many tokens for each size alone."""
EXACT = 1e-4
KEPT_BYTES = 4 << 30
"""Of the original's predictions: they are looked at some eight times."""
RATES = (3e-3, 6e-3)
BALANCED = ("balanced", 3e-3)
CANDIDATES = (BALANCED, ("frontier", 6e-3))
"""Of the one run: samplers and rates."""
ONCE, THIRD, ALL, UNIFORM, NONE = "one run", "three runs, a third each", "three runs, all of it each", "one run, uniform", "GPTQ, untrained"


@dataclass
class Bench:
    """The embedded default, encoded, with the original's predictions."""

    run: Fit
    store: Store
    table: Table
    text: Reference
    search: Reference
    report: Reference
    seconds: dict[str, float] = field(default_factory=dict)
    """Of training, by what was trained."""

    @property
    def decisions(self) -> tuple[Decision, ...]:
        found = trained(self.run.space)
        return tuple(replace(d, choices=tuple(c for c in d.choices if c.name in FORMATS)) for d in found)

    def network(self, settings: Settings) -> ElasticNetwork:
        """Untrained."""
        run, space = self.run, self.run.space
        matrices = stored_choices(space, self.decisions, lambda c: stored_matrices(self.store.variant, space, c, run.target, run.source))
        return ElasticNetwork(self.plain(), self.decisions, matrices, settings.rank, settings.seed)

    def plain(self) -> PreTrainedModel:
        """Every matrix in its largest choice, none elastic."""
        return self.run.elastic_model(self.store).set(self.run.space.largest())

    def trained(self, what: str, sampler: str, settings: Settings, only: str | None, progress: Progress) -> ElasticNetwork:
        """With `only`, one format's variants are all that is ever drawn."""
        network = self.network(settings)
        drawn = [replace(d, choices=tuple(c for c in d.choices if only in (None, c.name))) for d in self.decisions]
        period = max(1, settings.num_steps // settings.num_periods)
        kind, how = samplers.get(sampler), llm_qfa.RECIPE.training
        expected = self.run.expected(self.store, self.decisions) if kind.knows_losses else None
        made = kind(drawn, period, expected)
        began = time.perf_counter()
        subject = Decoupled(network, Divergence(network.model, self.text), expected if how.relative and sampler == how.sampler else None)
        train(subject, made, settings, checkpoint={}, keep=lambda _: None, progress=progress)
        self.seconds[what] = self.seconds.get(what, 0) + time.perf_counter() - began
        return network

    def separate(self, what: str, settings: Settings, rates: Sequence[float], progress: Progress) -> tuple[ElasticNetwork, list[float]]:
        """Three runs, stitched; each format from the rate that is better for it on the search split, and these rates."""
        best, chosen = dict[str, ElasticNetwork](), list[float]()
        for name in FORMATS:
            found = {rate: self.trained(f"{what} {rate:g}", "uniform", replace(settings, rate=rate), name, progress) for rate in rates}
            for network in found.values():
                settle(network)
            losses = {rate: kl(network.set(uniform(self.decisions, name)), self.search) for rate, network in found.items()}
            say(f"{what}: {name}", losses)
            chosen.append(min(losses, key=losses.__getitem__))
            best[name] = found[chosen[-1]]
        self.seconds[what] = mean([self.seconds[f"{what} {rate:g}"] for rate in rates])
        return stitched(self, best), chosen

    def once(self, settings: Settings, progress: Progress) -> tuple[str, dict[str, ElasticNetwork], Section]:
        """The name of the best of the `CANDIDATES` for the one run on the search split, all of them, and how the best was merged."""
        found, losses, merging = dict[str, ElasticNetwork](), dict[str, float](), dict[str, Section]()
        for sampler, rate in CANDIDATES:
            name = named(sampler, rate)
            found[name] = self.trained(name, sampler, replace(settings, rate=rate), None, progress)
            merging[name] = settled(self, found[name])
            losses[name] = mean([math.log(kl(found[name].set(config), self.search)) for config in self.configs().values()])
            say("one run", losses)
        best = min(losses, key=losses.__getitem__)
        self.seconds[ONCE] = self.seconds[best]
        return best, found, merging[best]

    def configs(self) -> dict[float, Config]:
        """By bits: the exact optimum of the table that the untrained variants have."""
        space = Space(self.decisions, 0, 0, sum(d.unit.num_weights for d in self.decisions))
        solver = Solver(space, self.table)
        low, _, high = (space.bits(uniform(self.decisions, name)) for name in FORMATS)
        place = {bits: low + (bits - BITS[0]) / (BITS[-1] - BITS[0]) * (high - low) for bits in BITS[1:-1]}
        found = {bits: solver.solve(Budget.parse(f"{stored:.6f} bits")) for bits, stored in place.items()}
        return {BITS[0]: uniform(self.decisions, FORMATS[0]), **found, BITS[-1]: uniform(self.decisions, FORMATS[2])}

    def quality(self, network: ElasticNetwork, config: Config) -> Quality:
        return self.measured(network, config)[0]

    def measured(self, network: ElasticNetwork, config: Config) -> tuple[Quality, tuple[float, ...]]:
        """And the loss of each segment."""
        return evaluate(network.set(config), self.report)


def named(sampler: str, rate: float) -> str:
    return f"{sampler} {rate:g}"


def shown(quality: Quality) -> str:
    return f"{quality.perplexity:.3f} / {quality.kl_mean:.5f}"


def say(what: str, figures: Mapping[Any, float]) -> None:
    print(what, "  ".join(f"{name}: {value:.5f}" for name, value in figures.items()), flush=True)


def settle(network: ElasticNetwork) -> None:
    """As it would be stored."""
    for variant in network.variants().values():
        variant.settle(variant.merged())


def stitched(bench: Bench, networks: Mapping[str, ElasticNetwork]) -> ElasticNetwork:
    """Each format's variants from the network that was trained in it alone."""
    made = bench.network(Settings())
    for (unit, name), variant in made.variants().items():
        trained = networks[name].variants()[unit, name]
        assert isinstance(trained, GridVariant)
        variant.settle(trained.scales.stored)
    return made


def settled(bench: Bench, network: ElasticNetwork) -> Section:
    """Adapters on against offsets, before offsets are rounded to what is stored, and after: so the network is left."""
    tokens, configs, merged = bench.report.tokens[:4], {name: uniform(bench.decisions, name) for name in FORMATS}, dict[str, Merged]()
    for name, config in configs.items():
        own = [variant for (_, n), variant in network.variants().items() if n == name]
        with torch.no_grad():
            adapted = network.set(config)(input_ids=tokens, use_cache=False).logits
            values = {d.unit.weights[0].name: network.variants()[d.unit.name, name].values for d in bench.decisions}
            plain = functional_call(bench.plain(), values, kwargs={"input_ids": tokens, "use_cache": False}).logits
            beyond = torch.cat([_beyond(variant).flatten() for variant in own]).float().mean()
        difference, same = float((adapted - plain).abs().max()), all(_codes_and_scales(variant) for variant in own)
        merged[name] = Merged(difference, same, float(beyond), bench.quality(network, config).kl_mean)
    settle(network)
    rows = []
    for name, was in merged.items():
        stored = bench.quality(network, configs[name]).kl_mean
        cells = (f"{was.difference:.1e}", "yes" if was.same else "no", f"{was.beyond:.2%}", f"{was.kl:.5f}", f"{stored:.5f}")
        rows.append(Row((name, *cells, f"{stored / was.kl - 1:+.2%}"), was.difference < EXACT and was.same))
        print("  ".join(rows[-1].cells), flush=True)
    header = (
        "format",
        "largest difference of a logit, adapter on against other offsets",
        "codes and scales the same to the bit",
        "zero points clipped",
        "KL as trained",
        "KL as stored",
        "what storing costs",
    )
    remark = (
        "Differences in float32. Offsets are then stored as halves of zero points, in steps of 1/256 and clipped to the integers' range; "
        "KL on the text for reports, one format everywhere. All other figures are of what is stored."
    )
    return Section("Merging", header, rows, (remark,))


@dataclass(frozen=True)
class Merged:
    """Of one format, before storing: what `settled` finds. `beyond`: the share of zero points that are clipped."""

    difference: float
    same: bool
    beyond: float
    kl: float


def _beyond(variant: Variant) -> torch.Tensor:
    """Which zero points, as they were trained, no integer's range has, (outputs, groups) bool."""
    assert isinstance(variant, GridVariant) and variant.adapter is not None
    zero = (variant.offset - variant.adapter.sums) / variant.scale
    return (variant.scale != 0) & ((zero < 0) | (zero > len(variant.levels) - 1))


def _codes_and_scales(variant: Variant) -> bool:
    """Whether the bytes with merged offsets hold the very codes and scales that were there."""
    assert isinstance(variant, GridVariant)
    scales = variant.format_.assemble({**variant.scales.stored, **variant.merged()})
    codes = taken(variant.codes, variant.order)
    again, after = variant.format_.read(variant.format_.pack(codes, scales))
    return torch.equal(codes, again) and torch.equal(variant.scales.stored["scale"], after.stored["scale"])


def samplers_section(every: Mapping[float, Mapping[str, Quality]]) -> Section:
    """Configs drawn uniformly, and by LLM-QFA's schedule: as many steps, at one rate."""
    rows = []
    for bits, found in every.items():
        drawn, balanced = found[UNIFORM], found[named(*BALANCED)]
        holds = balanced.perplexity < drawn.perplexity if bits in (BITS[0], BITS[-1]) else None
        rows.append(Row((f"{bits:g}", shown(drawn), shown(balanced)), holds))
    remark = (
        f"Perplexity / mean KL, as above, both at a rate of {BALANCED[1]:g}. At the ends, balanced holds where its perplexity is lower."
    )
    return Section("Samplers", ("bits", "uniform", "balanced"), rows, (remark,))


def cost_section(bench: Bench) -> Section:
    """Wall time of training."""
    ours, rows = bench.seconds[ONCE], list[Row]()
    for name in (ONCE, UNIFORM, THIRD, ALL):
        spent = bench.seconds[name]
        rows += [Row((name, f"{spent:.0f}", f"{ours / spent:.2f}"), ours < spent if name == ALL else None)]
    remark = "The one run reads as much text as three runs with a third each, and takes the place of three that read all of it."
    return Section("Cost", ("what", "seconds of training", "the one run's, as a part of it"), rows, (remark,))


@contextmanager
def opened() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(target="transformers", formats=(REST, *FORMATS), segments=SEGMENTS, device="cpu")
        store = Store(Path(folder))
        run.encode(store)
        table = run.score(store)
        text = Reference.of(run.model, windows(run.segments.calibration), kept_bytes=KEPT_BYTES)
        report = Reference.of(run.model, reported(run), kept_bytes=KEPT_BYTES)
        yield Bench(run, store, table, text, Reference.of(run.model, run.segments.search), report)


def merging_section(settings: Settings, progress: Progress) -> Section:
    """Of the recipe's sampler and rate alone."""
    how = llm_qfa.RECIPE.training
    with opened() as bench:
        return settled(bench, bench.trained(ONCE, how.sampler, replace(settings, rate=how.settings.rate), None, progress))


def sizes_sections(settings: Settings, progress: Progress) -> Iterator[Section]:
    """One run, and what it takes the place of."""
    with opened() as bench:
        chosen, candidates, merging = bench.once(settings, progress)
        networks = {ONCE: candidates[chosen], UNIFORM: bench.trained(UNIFORM, "uniform", settings, None, progress)}
        settle(networks[UNIFORM])
        third = replace(settings, num_steps=settings.num_steps // 3)
        networks[THIRD], rates = bench.separate(THIRD, third, RATES, progress)
        networks[ALL], longer = bench.separate(ALL, settings, RATES, progress)
        networks[NONE] = bench.network(settings)
        networks[named(*BALANCED)] = candidates[named(*BALANCED)]
        rows, every = list[Row](), dict[float, dict[str, Quality]]()
        for bits, config in sorted(bench.configs().items()):
            measured = {name: bench.measured(network, config) for name, network in networks.items()}
            every[bits] = found = {name: quality for name, (quality, _) in measured.items()}
            rise, error = perplexity_rise(measured[THIRD][1], measured[ONCE][1])
            ours, ends = found[ONCE].perplexity, bits in (BITS[0], BITS[-1])
            holds = rise <= error and ours <= found[ALL].perplexity * (1 + WITHIN) and (ours < found[UNIFORM].perplexity or not ends)
            cells = (f"{bits:g}", *map(shown, (found[name] for name in (NONE, THIRD, ALL, UNIFORM, ONCE))), f"{rise:+.2%} ± {error:.2%}")
            print("  ".join(cells), flush=True)
            rows.append(Row(cells, holds))
    remark = (
        f"Perplexity / mean KL to the original on all {bench.report.tokens.numel()} tokens that are for reports, of what is stored. "
        f"The one run takes {settings.num_steps} steps of {settings.batch_size} windows; three runs have a third of them each, or all of "
        "them each. A row holds where the one run's perplexity isn't above the first's by more than the standard error of their "
        f"difference over segments, is within {WITHIN:.0%} of the second's, and at the ends below that with configs drawn uniformly. What "
        "could be chosen was chosen on the search split: for the one run, "
        f"{chosen} of {', '.join(candidates)} (sampler and rate); for each of the others' three runs, the better rate of {RATES[0]:g} and "
        f"{RATES[1]:g}: at 2, 3 and 4 bits {_listed(rates)} with a third each, {_listed(longer)} with all of it each. Configs drawn "
        f"uniformly have {settings.rate:g}."
    )
    yield Section("Sizes", ("bits", NONE, THIRD, ALL, UNIFORM, ONCE, "the one run's perplexity over that of a third each"), rows, (remark,))
    yield samplers_section(every)
    yield merging
    yield cost_section(bench)


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def codes_section(subject: subspace.Subject, progress: Progress) -> Section:
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(target=subject.target, formats=(subject.rest, subject.format_), segments=subspace.SEGMENTS, device="cpu")
        store = Store(Path(folder))
        run.encode(store)
        return subspace.section(subject, run, store, progress)


PARTS = ("sizes", "search", "storages", "processes", "switching", "nested", "codes", "codebooks", "any-precision")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the one run (default {STEPS})")
    parser.add_argument("--assets", type=Path, default=None, help="a folder with cifar10 and cifar10-resnet, for Double Rounding")
    parser.add_argument("--only", choices=[*PARTS, "merging"], nargs="+", default=None, help="merging is of the one run otherwise")
    given, progress = parser.parse_args(), to_stderr()
    settings = replace(llm_qfa.RECIPE.training.settings, num_steps=given.steps, rate=RATES[0])
    works: dict[str, Callable[[], Iterable[Section]]] = {
        "merging": lambda: [merging_section(settings, progress)],
        "sizes": lambda: sizes_sections(settings, progress),
        "search": lambda: [searched.section(FORMATS, REST, SEGMENTS, given.steps, progress)],
        "storages": lambda: [storages.section()],
        "processes": lambda: [sharded.section()],
        "switching": lambda: [switching.section(given.assets, progress)],
        "nested": lambda: [nested_integers.section(progress)],
        "codes": lambda: [codes_section(subspace.CODES, progress)],
        "codebooks": lambda: [codes_section(subspace.CODEBOOKS, progress)],
        "any-precision": lambda: [nested_tables.section(progress)],
    }
    wanted = given.only or [name for name in PARTS if given.assets or name != "switching"]
    remarks = () if given.assets or given.only else ("Without ASSETS=FOLDER: Double Rounding on ResNet-20 is left out.",)
    sections, status, command = list[Section](), 1, "make bench-train-once"
    for name in wanted:
        for section in works[name]():
            sections.append(section)  # the page is there as far as it goes
            status = finish_page("train-once", "One run for all sizes", command, sections, remarks, partly=bool(given.only))
    return status


if __name__ == "__main__":
    sys.exit(main())
