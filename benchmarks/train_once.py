"""One run that trains every size, against runs that train one size each.

All start from the same GPTQ variants in 2, 3 and 4 bits with trainable offsets, on the embedded default. A run for one size
trains that size alone; between sizes, separate runs are stitched: each matrix from the run of its bits.

Besides: one stored tensor of integers a layer, run at several sizes (Double Rounding), codes of two bits, tuned (PV-Tuning), and
nested codebooks, which need no training (Any-Precision LLM).

    python benchmarks/train_once.py [--assets FOLDER] [--only SECTION]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import nested_tables
import subspace
import switching
import torch
from table import Row, Section, finish_page
from torch.func import functional_call
from transformers import PreTrainedModel

from anyfit.api import prepare
from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.space import Decision, Space
from anyfit.elastic.linear import ElasticNetwork, Variant
from anyfit.family.store import Store, stored_matrices
from anyfit.pipeline import Fit
from anyfit.progress import Progress, to_stderr
from anyfit.recipes import llm_qfa
from anyfit.scores.table import Table
from anyfit.searchers.exact import Solver
from anyfit.tasks.language import Quality, Reference, measure
from anyfit.trainers import samplers
from anyfit.trainers.decoupled import Decoupled
from anyfit.trainers.loop import Settings, train
from anyfit.trainers.losses import Divergence
from anyfit.training import stored_choices, trained, uniform
from anyfit.tuning.refining import windows

FORMATS = ("int2_offset", "int3_offset", "int4_offset")
BITS = (2.0, 2.5, 3.0, 3.5, 4.0)
"""Of the integers; their scales and offsets take one more."""
SEGMENTS, STEPS = 1024, 400
WITHIN = 0.02
"""Of the perplexity of runs with as many tokens for each size alone."""
EXACT = 1e-4
ONCE, THIRD, ALL, UNIFORM, NONE = "one run", "three runs, a third each", "three runs, all of it each", "one run, uniform", "GPTQ, untrained"


@dataclass
class Bench:
    """The embedded default, encoded, with the original's predictions."""

    run: Fit
    store: Store
    table: Table
    text: Reference
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
        made = samplers.get(sampler)(drawn, period)
        began = time.perf_counter()
        subject = Decoupled(network, Divergence(network.model, self.text))
        train(subject, made, settings, checkpoint={}, keep=lambda _: None, progress=progress)
        self.seconds[what] = self.seconds.get(what, 0) + time.perf_counter() - began
        return network

    def configs(self) -> dict[float, Config]:
        """By bits: the exact optimum of the table that the untrained variants have."""
        space = Space(self.decisions, 0, 0, sum(d.unit.num_weights for d in self.decisions))
        solver = Solver(space, self.table)
        low, _, high = (space.bits(uniform(self.decisions, name)) for name in FORMATS)
        place = {bits: low + (bits - BITS[0]) / (BITS[-1] - BITS[0]) * (high - low) for bits in BITS[1:-1]}
        found = {bits: solver.solve(Budget.parse(f"{stored:.6f} bits")) for bits, stored in place.items()}
        return {BITS[0]: uniform(self.decisions, FORMATS[0]), **found, BITS[-1]: uniform(self.decisions, FORMATS[2])}

    def quality(self, network: ElasticNetwork, config: Config) -> Quality:
        return measure(network.set(config), self.report)


def settle(network: ElasticNetwork) -> None:
    """As it would be stored."""
    for variant in network.variants().values():
        scales = variant.merged()
        assert scales is not None
        variant.settle(scales)


def stitched(bench: Bench, networks: Mapping[str, ElasticNetwork]) -> ElasticNetwork:
    """Each format's variants from the network that was trained in it alone."""
    made = bench.network(Settings())
    for (unit, name), variant in made.variants().items():
        variant.settle(networks[name].variants()[unit, name].scales)
    return made


def merge_section(bench: Bench, network: ElasticNetwork) -> Section:
    """Adapters on against offsets, before offsets are rounded to what is stored, and after."""
    tokens, rows = bench.report.tokens[:4], []
    for name in FORMATS:
        config = uniform(bench.decisions, name)
        with torch.no_grad():
            adapted = network.set(config)(input_ids=tokens, use_cache=False).logits
            values = {d.unit.weights[0].name: network.variants()[d.unit.name, name].values for d in bench.decisions}
            merged = functional_call(bench.plain(), values, kwargs={"input_ids": tokens, "use_cache": False}).logits
        same = all(_codes_and_scales(v) for (_, n), v in network.variants().items() if n == name)
        difference = float((adapted - merged).abs().max())
        cells = (name, f"{difference:.1e}", "yes" if same else "no")
        print("  ".join(cells), flush=True)
        rows.append(Row(cells, difference < EXACT and same))
    return Section(
        "Merging",
        ("format", "largest difference of a logit, adapter on against other offsets", "codes and scales the same to the bit"),
        rows,
        ("In float32. Offsets are then stored as halves of zero points, in steps of 1/256; the figures above are of what is stored.",),
    )


def _codes_and_scales(variant: Variant) -> bool:
    """Whether the bytes with merged offsets hold the very codes and scales that were there."""
    scales = variant.merged()
    assert scales is not None
    codes, before = variant.format_.read(variant.stored.data)
    again, after = variant.format_.read(variant.format_.pack(codes, scales))
    return torch.equal(codes, again) and torch.equal(before.stored["scale"], after.stored["scale"])


def cost_section(bench: Bench) -> Section:
    """Wall time of training."""
    ours, rows = bench.seconds[ONCE], list[Row]()
    for name in (ONCE, UNIFORM, THIRD, ALL):
        spent = bench.seconds[name]
        rows += [Row((name, f"{spent:.0f}", f"{ours / spent:.2f}"), ours < spent if name == ALL else None)]
    remark = "The one run reads as much text as three runs with a third each, and takes the place of three that read all of it."
    return Section("Cost", ("what", "seconds of training", "the one run's, as a part of it"), rows, (remark,))


def sizes_sections(settings: Settings, progress: Progress) -> Iterator[Section]:
    """One run, and what it takes the place of."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(target="transformers", formats=("int8_asym", *FORMATS), segments=SEGMENTS, device="cpu")
        store = Store(Path(folder))
        run.encode(store)
        table = run.score(store)
        bench = Bench(
            run, store, table, Reference.of(run.model, windows(run.segments.calibration)), Reference.of(run.model, run.segments.report)
        )
        once = bench.trained(ONCE, "balanced", settings, None, progress)
        merging = merge_section(bench, once)
        networks = {ONCE: once, UNIFORM: bench.trained(UNIFORM, "uniform", settings, None, progress)}
        for name, steps in ((THIRD, settings.num_steps // 3), (ALL, settings.num_steps)):
            alone = {f: bench.trained(name, "uniform", replace(settings, num_steps=steps), f, progress) for f in FORMATS}
            for network in alone.values():
                settle(network)
            networks[name] = stitched(bench, alone)
        for name in (ONCE, UNIFORM):
            settle(networks[name])
        networks[NONE] = bench.network(settings)
        rows = []
        for bits, config in sorted(bench.configs().items()):
            found = {name: bench.quality(network, config) for name, network in networks.items()}
            ours = found[ONCE].perplexity
            ends = bits in (BITS[0], BITS[-1])
            holds = ours <= found[THIRD].perplexity and ours <= found[ALL].perplexity * (1 + WITHIN)
            holds &= ours < found[UNIFORM].perplexity or not ends
            cells = (f"{bits:g}", *(f"{found[n].perplexity:.3f} / {found[n].kl_mean:.5f}" for n in (NONE, THIRD, ALL, UNIFORM, ONCE)))
            print("  ".join(cells), flush=True)
            rows.append(Row(cells, holds))
    remark = (
        "Perplexity / mean KL to the original on the report split, of what is stored. "
        f"The one run takes {settings.num_steps} steps of {settings.batch_size} windows; three runs have a third of them each, or all of "
        f"them each. A row holds where the one run is at or below the first, within {WITHIN:.0%} of the second, and at the ends better "
        "than with configs drawn uniformly."
    )
    yield Section("Sizes", ("bits", NONE, THIRD, ALL, UNIFORM, ONCE), rows, (remark,))
    yield merging
    yield cost_section(bench)


def codes_section(subject: subspace.Subject, progress: Progress) -> Section:
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(target=subject.target, formats=(subject.rest, subject.format_), device="cpu")
        store = Store(Path(folder))
        run.encode(store)
        return subspace.section(subject, run, store, progress)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the one run (default {STEPS})")
    parser.add_argument("--assets", type=Path, default=None, help="a folder with cifar10 and cifar10-resnet, for Double Rounding")
    parser.add_argument("--only", default=None, help="one of sizes, switching, codes, any-precision")
    args = parser.parse_args()
    settings, progress = replace(llm_qfa.RECIPE.training.settings, num_steps=args.steps), to_stderr()
    sections = list[Section]()
    if args.only in (None, "sizes"):
        sections += sizes_sections(settings, progress)
    if args.only in (None, "switching") and args.assets:
        sections.append(switching.section(args.assets, progress))
    if args.only in (None, "codes"):
        sections += [codes_section(subject, progress) for subject in subspace.SUBJECTS]
    if args.only in (None, "any-precision"):
        sections.append(nested_tables.section(progress))
    remarks = () if args.assets or args.only else ("Without ASSETS=FOLDER: Double Rounding on ResNet-20 is left out.",)
    return finish_page("train-once", "One run for all sizes", "make bench-train-once", sections, remarks)


if __name__ == "__main__":
    sys.exit(main())
