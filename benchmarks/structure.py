"""Networks with parts left out: exact removal, what it costs in quality, and whether a latency that was asked for is kept.

python benchmarks/structure.py [--only SECTION]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from table import Row, Section, finish_page
from torch import Tensor

from anyfit import Family, fit
from anyfit.api import prepare
from anyfit.calibration.collect import collect
from anyfit.calibration.statistics import DAMPING
from anyfit.core.config import FORMAT, WIDTH, Config, format_of
from anyfit.core.errors import BudgetError
from anyfit.core.space import Decision
from anyfit.costs.latency import LatencyTable
from anyfit.costs.stopwatch import pinned
from anyfit.family import Point
from anyfit.importance import importances, sparsity
from anyfit.importance.base import Repair
from anyfit.importance.wanda import weight_scores
from anyfit.measuring import measure as measure_latency
from anyfit.modeling_cut import spread
from anyfit.pipeline import Fit
from anyfit.progress import Silent, to_stderr
from anyfit.searchers.exact import Solver
from anyfit.targets import onnxruntime_session
from anyfit.targets.onnx_graph import LOGITS
from anyfit.tasks.language import Quality, Reference, measure

Taken = Mapping[Config, float]
"""Milliseconds."""
Qualities = Mapping[Config, Quality]

EXACT = 1e-10
HALF = 0.5
"""Of magnitude's rise in perplexity."""
KEPT = 0.75
TARGETS = (1.25, 1.5, 2.0, 3.0)
SETTINGS = ((1, 128), (32, 32))
"""(texts, tokens) that are run together."""
THREADS, ROUNDS = 1, 31
JOINT_FORMATS = ("F32", "int8_sym", "int4_sym")
JOINT_BUDGETS = ((1.1, 0.5), (1.2, 0.35), (1.3, 0.3), (1.5, 0.25), (1.8, 0.2))
"""(times as fast, share of the bytes) of the network in float32."""
DENSITIES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
PATTERNS = ((2, 4), (4, 8), (1, 2))
"""(kept, of)."""
WITHIN = 0.01
"""Of the dense network's quality, up to which sparsity counts as free."""


def exactness() -> Section:
    """The levels of the recipe's importance against the paper's formulas, one removal after another, in float64."""
    rows = []
    for outputs, inputs, size in ((48, 64, 1), (48, 96, 8)):
        generator = torch.Generator().manual_seed(inputs)
        mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
        vectors = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) @ mixing
        weight, moments = torch.randn(outputs, inputs, generator=generator), (vectors.T @ vectors / len(vectors)).float()
        order, levels = _removed_one_by_one(weight.double(), moments.double(), size)
        ladder = importances.get("obs").ladder(weight, moments, size)
        columns = spread(ladder.order, size)
        repair = Repair.of(weight, moments, columns)
        largest = 0.0
        for kept, level in levels.items():
            found = torch.zeros_like(level)
            found[:, columns[: kept * size]] = repair.keeping(kept * size)
            largest = max(largest, float((found - level).abs().max()))
        same = ladder.order.tolist() == order
        rounded = max(float((ladder.level(kept).double() - level).abs().max()) for kept, level in levels.items())
        cells = (f"{outputs} x {inputs}, {size} columns each", "yes" if same else "no", f"{largest:.1e}", f"{rounded:.1e}")
        rows.append(Row(cells, same and largest <= EXACT))
    remark = (
        "Structures removed one at a time by the paper's updates of W and of the inverse, in float64, against this recipe's order and the "
        f"least squares on what it keeps: at most {EXACT:.0e} apart. What is stored is float32."
    )
    return Section("Removal is exact", ("matrix", "same order", "largest difference", "as stored"), rows, [remark])


def _removed_one_by_one(weight: Tensor, moments: Tensor, size: int) -> tuple[list[int], dict[int, Tensor]]:
    """The order (kept longest first), and the weights for every number of kept structures: ZipLM's recursion as it is printed."""
    number = weight.shape[1] // size
    hessian = moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    inverse, weight = torch.linalg.inv(hessian), weight.clone()
    left, removed, levels = list(range(number)), [], {number: weight.clone()}
    while left:
        costs = {}
        for structure in left:
            own = slice(structure * size, (structure + 1) * size)
            costs[structure] = float((weight[:, own] @ torch.linalg.inv(inverse[own, own]) * weight[:, own]).sum())
        least = min(left, key=costs.__getitem__)
        own = slice(least * size, (least + 1) * size)
        solved = torch.linalg.solve(inverse[own, own], inverse[own])
        weight = weight - weight[:, own] @ solved
        inverse = inverse - inverse[:, own] @ solved
        left.remove(least)
        removed.append(least)
        gone = [s * size + c for s in removed for c in range(size)]
        weight[:, gone] = 0
        inverse[gone] = inverse[:, gone] = 0
        inverse[gone, gone] = 1
        levels[len(left)] = weight.clone()
    return removed[::-1], levels


@dataclass
class Bench:
    """The embedded default in memory, and its report split."""

    run: Fit
    reference: Reference

    @classmethod
    def made(cls) -> Bench:
        run = prepare(recipe="ziplm", target="onnxruntime", device="cpu")
        return cls(run, Reference.of(run.model, run.segments.report))

    def statistics(self, names: Mapping[str, object]) -> dict[str, Tensor]:
        """Second moments of the inputs of these matrices, by matrix."""
        weights = [weight for weight in self.run.weights if weight.name in names]
        found = collect(self.run.model, self.run.architecture, weights, self.run.segments.calibration, progress=Silent())
        return {weight.name: found[str(weight.input)].hessian for weight in weights}

    def with_matrices(self, matrices: Mapping[str, Tensor]) -> Quality:
        """Measured with these in place of the original's, which is put back."""
        parameters = {name: self.run.model.get_parameter(name) for name in matrices}
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(matrices[name])
        try:
            return measure(self.run.model, self.reference)
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])


def quarter(bench: Bench) -> Section:
    """A quarter of each feed-forward's channels, by every importance."""
    found = {name: s for name, s in bench.run.structures.items() if s.axis == WIDTH}
    moments, original = bench.statistics(found), bench.reference.quality.perplexity
    rises, rows = {}, []
    for importance in ("magnitude", "wanda", "magnitude_repaired", "wanda_repaired", "obs"):
        matrices, began = {}, time.perf_counter()
        for name, structure in found.items():
            kept = round(KEPT * structure.num)
            ladder = importances.get(importance).ladder(bench.run.model.get_parameter(name).detach(), moments[name], 1)
            matrices[name] = ladder.level(kept)
        seconds = time.perf_counter() - began
        quality = bench.with_matrices(matrices)
        rises[importance] = quality.perplexity - original
        holds = rises["obs"] < HALF * rises["magnitude"] if importance == "obs" else None
        cells = (importance, f"{quality.perplexity:.3f}", f"{rises[importance]:+.3f}", f"{quality.kl_mean:.4f}", f"{seconds:.1f}")
        rows.append(Row(cells, holds))
    remark = (
        f"The embedded default, perplexity {original:.3f}; {1 - KEPT:.0%} of the channels of every feed-forward removed at once, nothing "
        f"trained. Holds below {HALF:.0%} of magnitude's rise."
    )
    return Section("A quarter of the channels", ("importance", "perplexity", "rise", "KL", "seconds"), rows, [remark])


@contextmanager
def families(batch: int, sequence: int, formats: tuple[str, ...] | None = None) -> Iterator[tuple[Family, LatencyTable, Path]]:
    """The embedded default pruned for a latency as measured now."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wishes = {"target": "onnxruntime", "formats": formats, "progress": to_stderr()}
        table = measure_latency(batch=batch, sequence=sequence, threads=THREADS, **wishes)
        table.write(folder / "latency.json")
        yield fit(output=folder / "default.family", recipe="ziplm", latency=folder / "latency.json", **wishes), table, folder


def side_by_side(folders: list[Path], batch: int, sequence: int) -> list[float]:
    """Milliseconds of each model, all taking turns: medians of the ratios to the first, times its median."""
    sessions = [onnxruntime_session.opened(folder, threads=THREADS) for folder in folders]
    tokens = (np.arange(batch * sequence).reshape(batch, sequence) % 2000).astype(np.int64)
    feeds = [onnxruntime_session.feed(session, tokens) for session in sessions]
    runs: list[Callable[[], object]] = [lambda s=s, feed=feed: s.run([LOGITS], feed) for s, feed in zip(sessions, feeds, strict=True)]
    times: list[list[float]] = []
    with pinned(THREADS):
        for _ in range(ROUNDS):
            row = []
            for run in runs:
                run()
                began = time.thread_time()  # of the one thread: other processes' turns don't count
                run()
                row.append(1e3 * (time.thread_time() - began))
            times.append(row)
    first = statistics.median(row[0] for row in times)
    return [first * statistics.median(row[i] / row[0] for row in times) for i in range(len(runs))]


def speed(batch: int, sequence: int) -> tuple[Section, Section]:
    """Speed-ups asked for against those measured; searched sizes against uniform ones at equal time."""
    with families(batch, sequence) as (family, table, folder):
        largest = family.space.largest()
        whole = family.space.costs(largest)["ms"]
        points = {f"{target:g}x": family.select(f"{target:g}x") for target in TARGETS}
        uniform = [p for p in family.points if p.uniform and 1.2 < whole / family.size(p) < 3.2]
        uniform = uniform[:: max(1, len(uniform) // 5)][:5]
        searched = [family.select(f"ms <= {family.size(point):.6f}") for point in uniform]
        configs: dict[Config, Path] = {}
        for point in (family.point(largest), *points.values(), *uniform, *searched):
            if point.config not in configs:
                configs[point.config] = folder / f"{len(configs)}"
                _write(family, point.config, configs[point.config])
        taken = dict(zip(configs, side_by_side(list(configs.values()), batch, sequence), strict=True))
        quality = _qualities(family, [*points.values(), *uniform, *searched])
    return _kept(family, table, points, taken, quality), _beaten(f"batch {batch}, {sequence} tokens", uniform, searched, taken, quality)


def _kept(family: Family, table: LatencyTable, points: Mapping[str, Point], taken: Taken, quality: Qualities) -> Section:
    """Speed-ups as they were asked for, predicted and measured."""
    whole, setting = taken[family.space.largest()], table.setting
    rows = [
        Row(
            (
                asked,
                f"{family.size(point):.3f}",
                f"{taken[point.config]:.3f}",
                f"{family.size(point) / taken[point.config] - 1:+.1%}",
                f"{whole / taken[point.config]:.2f}x",
                f"{quality[point.config].kl_mean:.3f} / {quality[point.config].perplexity:.2f}",
            ),
            whole / taken[point.config] >= float(asked[:-1]),
        )
        for asked, point in points.items()
    ]
    remark = (
        f"The embedded default in {table.device.runtime}, {THREADS} thread: {whole:.3f} ms whole, {table.rest('F32'):.3f} ms of them "
        f"outside attention and feed-forward; perplexity {family.original.report.perplexity:.2f}. Times are medians, all models taking "
        "turns. A row holds where the measured speed-up is at least the one that was asked for. Nothing is trained."
    )
    header = ("asked for", "predicted ms", "measured ms", "predicted against measured", "measured speed-up", "KL / perplexity")
    return Section(f"The speed that was asked for: batch {setting.batch}, {setting.sequence} tokens", header, rows, [remark])


def _beaten(where: str, uniform: list[Point], searched: list[Point], taken: Taken, quality: Qualities) -> Section:
    """Uniform sizes, and what is found for the time that they are predicted to take."""
    rows = [
        Row(
            (
                str(one.uniform),
                f"{taken[one.config]:.3f} / {taken[other.config]:.3f}",
                f"{quality[one.config].kl_mean:.4f} / {quality[one.config].perplexity:.2f}",
                f"{quality[other.config].kl_mean:.4f} / {quality[other.config].perplexity:.2f}",
            ),
            quality[other.config].kl_mean <= quality[one.config].kl_mean and taken[other.config] <= 1.02 * taken[one.config],
        )
        for one, other in zip(uniform, searched, strict=True)
    ]
    remark = (
        "Uniform: the same density everywhere, the same weights to choose from. Searched: the best within the uniform one's predicted "
        "time. A row holds where it is closer to the original and measured to take no longer, within 2%."
    )
    header = ("uniform", "ms: uniform / searched", "uniform KL / perplexity", "searched KL / perplexity")
    return Section(f"Searched against uniform: {where}", header, rows, [remark])


def joint() -> Section:
    """Structure and formats together against either alone, within two budgets."""
    with families(*SETTINGS[0], JOINT_FORMATS) as (family, table, _):
        space, rows = family.space, []
        whole = space.costs(space.largest())
        kinds = {
            "structure alone": lambda d, c: format_of(c.name) == "F32",
            "formats alone": lambda d, c: d.axis == FORMAT or c.name.startswith(f"{_widest(d)} "),
        }
        solvers = {
            kind: Solver(
                replace(space, decisions=tuple(replace(d, choices=tuple(c for c in d.choices if fits(d, c))) for d in space.decisions)),
                family.manifest.table,
            )
            for kind, fits in kinds.items()
        }
        reference = Reference.of(family.extract(space.largest()), family.text()["report"])
        for faster, share in JOINT_BUDGETS:
            budget = family.budget([f"ms <= {whole['ms'] / faster:.6f}", f"{share * whole['bytes']:.0f} B"])
            found = {"together": family.select(budget).config}
            for kind, solver in solvers.items():
                with suppress(BudgetError):
                    found[kind] = solver.solve(budget)
            kls = {kind: measure(family.extract(config), reference).kl_mean for kind, config in found.items()}
            alone = [kls[kind] for kind in kinds if kind in kls]
            cells = (f"{faster:g}x, {share:.0%}", *(f"{kls[kind]:.4f}" if kind in kls else "not possible" for kind in (*kinds, "together")))
            rows.append(Row(cells, kls["together"] <= min(alone, default=float("inf"))))
    remark = (
        f"The embedded default in {table.device.runtime}, {THREADS} thread; formats {', '.join(JOINT_FORMATS)}. Both budgets hold: as many "
        "times as fast as the whole network in float32, and a share of its bytes. KL to the original on the report split."
    )
    return Section("Structure and formats together", ("budgets", *kinds, "together"), rows, [remark])


def _widest(decision: Decision) -> str:
    """The size of a module that keeps all."""
    return max((c.name.partition(" ")[0] for c in decision.choices), key=lambda name: int(name.lstrip("abcdefghijklmnopqrstuvwxyz")))


def _write(family: Family, config: Config, path: Path) -> None:
    """As `Family.export` does, of a config that no budget need lead to."""
    from anyfit.targets import targets
    from anyfit.targets.base import CutTarget

    CutTarget.of(targets.get(family.target)).write_cut(path, family.source, family.cut(config))


def _qualities(family: Family, points: list) -> dict[Config, Quality]:
    """On the report split, of what is extracted."""
    text = family.text()["report"]
    reference = Reference.of(family.extract(family.space.largest()), text)
    return {p.config: p.report or measure(family.extract(p.config), reference) for p in {p.config: p for p in points}.values()}


def essential(bench: Bench) -> Section:
    """One-shot masks of single weights: how much is free, and where quality falls off."""
    names = {weight.name: weight for weight in bench.run.weights if weight.block is not None}
    moments = bench.statistics(names)
    matrices = {name: bench.run.model.get_parameter(name).detach() for name in names}
    scores = {
        "magnitude": {name: matrix.abs() for name, matrix in matrices.items()},
        "wanda": {name: weight_scores(matrix, moments[name]) for name, matrix in matrices.items()},
    }
    generator = torch.Generator().manual_seed(0)
    scores["random"] = {name: torch.rand(matrix.shape, generator=generator) for name, matrix in matrices.items()}
    original, found = bench.reference.quality.perplexity, {}
    for kind in scores:
        for density in DENSITIES:
            if kind == "wanda":
                masks = {name: sparsity.keep_uniform(own, density) for name, own in scores[kind].items()}
            else:
                masks = sparsity.keep_global(scores[kind], density, 0.05)
            found[kind, f"{1 - density:.0%}"] = _masked(bench, matrices, masks)
        for keep, group in PATTERNS:
            masks = {name: sparsity.keep_of_group(own, keep, group) for name, own in scores[kind].items()}
            assert all((mask.unflatten(-1, (-1, group)).sum(-1) == keep).all() for mask in masks.values()), "an N:M mask isn't exact"
            found[kind, f"keeps {keep} of {group}"] = _masked(bench, matrices, masks)
    rows = []
    for what in dict.fromkeys(what for _, what in found):
        kls = {kind: found[kind, what] for kind in scores}
        shown = [f"{kls[kind].perplexity:.2f}" for kind in scores]
        pattern = " of " in what
        holds = kls["wanda"].perplexity <= kls["magnitude"].perplexity <= kls["random"].perplexity if pattern else None
        rows.append(Row((what, *shown), holds))
    knees = {kind: _knee([found[kind, f"{1 - d:.0%}"].perplexity for d in DENSITIES]) for kind in scores}
    free = {kind: max(1 - d for d in DENSITIES if found[kind, f"{1 - d:.0%}"].perplexity <= (1 + WITHIN) * original) for kind in scores}
    rows.append(Row((f"free, within {WITHIN:.0%}", *(f"{free[kind]:.0%}" for kind in scores)), free["magnitude"] >= free["random"]))
    rows.append(Row(("knee", *(f"{1 - DENSITIES[knees[kind]]:.0%}" for kind in scores))))
    remark = (
        f"The embedded default, perplexity {original:.3f}; masks of all matrices in the blocks, nothing trained: magnitude in one pool "
        "of all weights, Wanda row by row, and chance. The knee is the point furthest from the line between the ends, of the logarithm of "
        "the perplexity. Rows of patterns hold where Wanda is no worse than magnitude, and magnitude no worse than chance. Zeros alone "
        "save neither bytes nor time."
    )
    return Section("Essential sparsity", ("weights removed", *scores), rows, [remark])


def _masked(bench: Bench, matrices: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Quality:
    return bench.with_matrices({name: matrix * masks[name] for name, matrix in matrices.items()})


def _knee(values: list[float]) -> int:
    """The place furthest below the chord of (place, logarithm)."""
    y = np.log(values)
    chord = np.linspace(y[0], y[-1], len(y))
    return int((chord - y).argmax())


def main() -> int:
    parser = argparse.ArgumentParser()
    names = ("exactness", "quarter", "speed", "joint", "essential")
    parser.add_argument("--only", choices=names, default=None)
    only = parser.parse_args().only
    wanted = names if only is None else (only,)
    bench = Bench.made() if {"quarter", "essential"} & set(wanted) else None
    works: dict[str, Callable[[], Iterable[Section]]] = {
        "exactness": lambda: [exactness()],
        "quarter": lambda: [quarter(bench)] if bench else [],
        "speed": lambda: [section for setting in SETTINGS for section in speed(*setting)],
        "joint": lambda: [joint()],
        "essential": lambda: [essential(bench)] if bench else [],
    }
    sections, status = list[Section](), 1
    for name in wanted:  # the page is there as far as it goes, should the next section take too long
        sections += works[name]()
        status = finish_page("structure", "Fewer parts", "make bench-structure", sections)
    return status


if __name__ == "__main__":
    sys.exit(main())
