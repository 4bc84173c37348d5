"""Networks with parts left out: exact removal, what it costs in quality, and whether a latency that was asked for is kept.

python benchmarks/structure.py [--only SECTION ...] [--steps NUMBER] [--minilm FOLDER --assets FOLDER --environments FOLDER]

With `--minilm`, the folder of all-MiniLM-L6-v2, the sections are about that encoder and go to a page of their own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import recovery
import torch
from encoders import Contest, distilled, integers, retained
from pruned import (
    COPIES,
    NEARBY,
    THREADS,
    Qualities,
    Subject,
    Taken,
    default,
    families,
    harm,
    minilm,
    named,
    qualities,
    shown,
    timed,
    within,
)
from singles import NUM_SEGMENTS, singles
from table import Row, Section, finish_page
from torch import Tensor

from anyfit import Family, fit
from anyfit.api import prepare
from anyfit.calibration.collect import collect
from anyfit.calibration.statistics import DAMPING
from anyfit.core.config import FORMAT, SPARSITY, WIDTH, Config, format_of
from anyfit.core.errors import BudgetError
from anyfit.core.space import Decision
from anyfit.costs.latency import LatencyTable
from anyfit.family import Point
from anyfit.importance import importances
from anyfit.importance.base import NetworkImportance, Repair
from anyfit.interface import LANGUAGE, interface_of
from anyfit.modeling_cut import spread
from anyfit.pipeline import Fit
from anyfit.progress import Silent, to_stderr
from anyfit.report import sparsity
from anyfit.searchers.exact import Solver
from anyfit.structure.masks import mask_of
from anyfit.tasks import task_of
from anyfit.tasks.base import Quality, Reference
from anyfit.tasks.language import Quality as LanguageQuality

EXACT = 1e-10
HALF = 0.5
"""Of what magnitude costs."""
KEPT = 0.75
TARGETS = (1.25, 1.5, 2.0, 3.0)
JOINT_FORMATS = ("F32", "int8_sym", "int4_sym")
JOINT_BUDGETS = ((0.7, 0.3), (0.7, 0.2), (1.1, 0.5), (1.3, 0.3), (1.5, 0.25))
"""(times as fast, share of the bytes) of the network in float32. Formats alone make it slower on processors without instructions for
them, so that they fit within the first two only."""


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
    """A network in memory, and its report split."""

    name: str
    run: Fit
    reference: Reference

    @classmethod
    def made(cls, subject: Subject) -> Bench:
        run = prepare(subject.model, recipe="ziplm", target="onnxruntime", device="cpu", **subject.wishes)
        return cls(subject.name, run, task_of(run.checkpoint.config).reference(run.model, run.segments.report))

    @property
    def about(self) -> str:
        """The network as it is."""
        own = self.reference.quality.own
        return self.name + (f", {own[0]} {own[1]}" if own else "")

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
            return self.reference.measured(self.run.model)
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])


def quarter(bench: Bench) -> Section:
    """A quarter of each feed-forward's channels, by every importance."""
    found = {name: s for name, s in bench.run.structures.items() if s.axis == WIDTH}
    moments, original, run = bench.statistics(found), bench.reference.quality, bench.run
    # Taylor's is of what a language model loses.
    taylor = ("taylor", "taylor_repaired") if interface_of(run.checkpoint.config) is LANGUAGE else ()
    harms, rows = {}, []
    for importance in ("magnitude", "wanda", "magnitude_repaired", "wanda_repaired", *taylor, "obs"):
        matrices, began, part = {}, time.perf_counter(), importances.get(importance)
        whole = isinstance(part, NetworkImportance)
        scores = part.scores(run.model, run.architecture, found, run.segments.calibration, Silent()) if whole else {}
        for name, structure in found.items():
            kept = round(KEPT * structure.num)
            own = part.of(scores[name]) if whole else part
            matrices[name] = own.ladder(run.model.get_parameter(name).detach(), moments[name], 1).level(kept)
        seconds = time.perf_counter() - began
        quality = bench.with_matrices(matrices)
        harms[importance] = harm(quality, original)
        holds = harms["obs"] < HALF * harms["magnitude"] if importance == "obs" else None
        rows.append(Row((importance, shown(quality), f"{harms[importance]:+.4f}", f"{seconds:.1f}"), holds))
    lost = "rise in perplexity" if isinstance(original, LanguageQuality) else original.distance
    remark = (
        f"{bench.about}; {1 - KEPT:.0%} of the channels of every feed-forward removed at once, nothing trained. Holds below {HALF:.0%} of "
        f"what magnitude loses ({lost})."
    )
    return Section("A quarter of the channels", ("importance", named(original), "lost", "seconds"), rows, [remark])


def trajectory(bench: Bench) -> Section:
    """Scores of structures against what removing them costs, on the search split."""
    text = bench.run.segments.search[:NUM_SEGMENTS]
    found = replace(bench, reference=task_of(bench.run.checkpoint.config).reference(bench.run.model, text))
    return singles(found.run, found.reference.quality, found.with_matrices)


def speed(subject: Subject, batch: int, sequence: int) -> list[Section]:
    """Speed-ups asked for against those measured; searched sizes against uniform ones at equal time."""
    family, table, folder = families(subject, batch, sequence)
    whole = family.space.costs(family.space.largest())["ms"]
    points = {f"{target:g}x": family.select(f"{target:g}x") for target in TARGETS}
    uniform = [p for p in family.points if p.uniform and 1.2 < whole / family.size(p) < 3.2]
    uniform = uniform[:: max(1, len(uniform) // 5)][:5]
    nearby = [[family.select(f"ms <= {share * family.size(point):.6f}") for share in NEARBY] for point in uniform]
    taken = timed(family, [*points.values(), *uniform, *chain(*nearby)], folder, batch, sequence)
    pairs = zip(uniform, nearby, strict=True)
    searched = [candidates[within(taken[one.config], [taken[other.config] for other in candidates])] for one, candidates in pairs]
    quality = qualities(family, [*points.values(), *uniform, *searched])
    sections = [_kept(subject, family, table, points, taken, quality)]
    return [*sections, _beaten(f"batch {batch}, {sequence} tokens", uniform, searched, taken, quality)]


def _kept(subject: Subject, family: Family, table: LatencyTable, points: Mapping[str, Point], taken: Taken, quality: Qualities) -> Section:
    """Speed-ups as they were asked for, as budgets count them, and as measured."""
    whole, setting, counted = taken[family.space.largest()], table.setting, table.whole["F32"]
    rows = [
        Row(
            (
                asked,
                f"{family.size(point):.3f}",
                f"{taken[point.config]:.3f}",
                f"{family.size(point) / counted / (taken[point.config] / whole) - 1:+.1%}",
                f"{whole / taken[point.config]:.2f}x",
                shown(quality[point.config]),
            ),
            whole / taken[point.config] >= float(asked[:-1]),
        )
        for asked, point in points.items()
    ]
    remark = (
        f"{subject.name} in {table.device.runtime}, {THREADS} thread: {whole:.3f} ms whole, {table.rest('F32'):.3f} ms of them "
        f"outside attention and feed-forward; {named(family.original.report)} {shown(family.original.report)} as it is. Times are medians, "
        f"all models taking turns, and means of {COPIES} copies of each. Counted against measured: as shares of the whole network, which "
        f"took {counted:.3f} ms when its table was made, as the machine isn't always as fast. A row holds where the measured speed-up is "
        "at least the one that was asked for. Nothing is trained."
    )
    header = ("asked for", "counts as ms", "measured ms", "counted against measured", "measured speed-up", named(family.original.report))
    return Section(f"The speed that was asked for: batch {setting.batch}, {setting.sequence} tokens", header, rows, [remark])


def _beaten(where: str, uniform: list[Point], searched: list[Point], taken: Taken, quality: Qualities) -> Section:
    """Uniform sizes, and what is found for the time that they take by the table."""
    rows = [
        Row(
            (
                str(one.uniform),
                f"{taken[one.config]:.3f} / {taken[other.config]:.3f}",
                shown(quality[one.config]),
                shown(quality[other.config]),
            ),
            quality[other.config].loss <= quality[one.config].loss and taken[other.config] <= taken[one.config],
        )
        for one, other in zip(uniform, searched, strict=True)
    ]
    same = [str(one.uniform) for one, other in zip(uniform, searched, strict=True) if one.config == other.config]
    remark = (
        "Uniform: the same density everywhere, the same weights to choose from. Searched: the best within "
        f"{NEARBY[0]:.0%} to {NEARBY[-1]:.0%} of the uniform one's time by the table, in steps of a percent; of these the largest that is "
        "measured to take no longer, by the times that are shown, so that both are compared at equal measured time. A row holds where it "
        "is no further from the original." + (f" What is searched is the uniform network itself for {', '.join(same)}." if same else "")
    )
    figures = named(next(iter(quality.values())))
    header = ("uniform", "ms: uniform / searched", f"uniform: {figures}", f"searched: {figures}")
    return Section(f"Searched against uniform: {where}", header, rows, [remark])


def joint() -> Section:
    """Structure and formats together against either alone, within two budgets."""
    subject = default()
    family, table, folder = families(subject, *subject.settings[0], JOINT_FORMATS)
    space, rows = family.space, list[Row]()
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
    reference = task_of(family.source.config).reference(family.extract(space.largest()), family.text()["report"])
    chosen = [_chosen(family, solvers, faster, share) for faster, share in JOINT_BUDGETS]
    taken = timed(family, [family.point(config) for found in chosen for config in found.values()], folder, *subject.settings[0])
    for (faster, share), found in zip(JOINT_BUDGETS, chosen, strict=True):
        bound, together = taken[space.largest()] / faster, taken[found["together"]]
        kls = {kind: reference.loss(family.extract(config)) for kind, config in found.items()}
        least = min((kls[kind] for kind in kinds if kind in kls), default=float("inf"))
        shown_ = [f"{kls[kind]:.4f} / {taken[found[kind]]:.3f}" if kind in found else "not possible" for kind in (*kinds, "together")]
        cells = (f"{faster:g}x, {share:.0%}", f"{bound:.3f}", *shown_)
        rows.append(Row(cells, kls["together"] <= least and together <= bound))
    remark = (
        f"The embedded default in {table.device.runtime}, {THREADS} thread, {taken[space.largest()]:.3f} ms whole; formats "
        f"{', '.join(JOINT_FORMATS)}. Both budgets are asked for: as many times as fast as the whole network in float32, and a share of "
        "its bytes. Of each network the KL to the original on the report split, and the milliseconds that it is measured to take, all of "
        "them taking turns. A row holds where what is chosen together is measured to keep to the time, and is no further from the "
        "original than either alone."
    )
    header = ("budgets", "ms at most", *(f"{kind}: KL / ms" for kind in (*kinds, "together")))
    return Section("Structure and formats together", header, rows, [remark])


def _chosen(family: Family, solvers: Mapping[str, Solver], faster: float, share: float) -> dict[str, Config]:
    """What is best within two budgets, of everything (`together`) and of each solver's choices, where these can meet them."""
    whole = family.space.costs(family.space.largest())
    budget = family.budget([f"ms <= {whole['ms'] / faster:.6f}", f"{share * whole['bytes']:.0f} B"])
    found = {"together": family.select(budget).config}
    for kind, solver in solvers.items():
        with suppress(BudgetError):
            found[kind] = solver.solve(budget)
    return found


def recovered(steps: int) -> Iterable[Section]:
    """What training brings back."""
    subject = default()
    family, _, _ = families(subject, *subject.settings[0])
    yield recovery.recovery(family, family.path.parent / "latency.json", steps)


def searched() -> Iterable[Section]:
    """Who says what an error counts."""
    subject = default()
    yield recovery.searched(families(subject, *subject.settings[0])[0])


def _widest(decision: Decision) -> str:
    """The size of a module that keeps all."""
    return max((c.name.partition(" ")[0] for c in decision.choices), key=lambda name: int(name.lstrip("abcdefghijklmnopqrstuvwxyz")))


def essential(subject: Subject) -> Section:
    """What the recipe says of a network: how much is free, and where quality falls off."""
    with tempfile.TemporaryDirectory() as name:
        wishes = {"recipe": "essential-sparsity", "target": "transformers", "progress": to_stderr(), **subject.wishes}
        family = fit(subject.model, output=Path(name) / "masked.family", **wishes)
        found = {curve.score: curve for curve in sparsity.curves(family)}
        searched = {share: family.select(f"weights <= {1 - share:.0%}") for share in found["wanda"].shares if share}
        patterns = _patterns_hold(family)
        mixed = qualities(family, list(searched.values()))
    ordered = [found[score] for score in ("magnitude", "wanda", "random")]
    rows = []
    for what, *figures in sparsity.rows(ordered):
        holds, best = None, ""
        if " of " in what:
            magnitude, wanda, chance = map(float, figures)
            holds = wanda <= magnitude <= chance and patterns
        elif what.startswith("free"):
            holds = ordered[0].free >= ordered[2].free
        elif (share := float(what.rstrip("%")) / 100 if what.endswith("%") else 0.0) in searched:
            quality = mixed[searched[share].config]
            best, holds = sparsity.shown(quality), quality.loss <= min(curve.shares[share].loss for curve in ordered)
        rows.append(Row((what, *figures, best), holds))
    original = family.original.report
    remark = (
        f"anyfit fit --recipe essential-sparsity; {subject.name}, {sparsity.named(original)}"
        f"{f' {original.own[1]} whole' if original.own else ''}; masks of all matrices in the blocks, nothing trained: magnitude in one "
        "pool of all weights, Wanda row by row, and chance. Searched: the best mix of masks for as many weights, matrix by matrix; it "
        "holds where it is no further from the original than any one mask everywhere. The knee is the point furthest from the line "
        "between the ends, of the logarithm of the perplexity, or of the distance of embeddings. Rows of patterns hold where Wanda is no "
        "worse than magnitude, magnitude no worse than chance, and every group of the extracted networks has exactly as many weights as "
        "it should. Zeros alone save neither bytes nor time."
    )
    return Section("Essential sparsity", ("weights removed", "magnitude", "wanda", "random", "searched"), rows, [remark])


def _patterns_hold(family: Family) -> bool:
    """Whether every group of the networks that are extracted with a pattern everywhere has as many weights as it should, but for weights
    that were zero before."""
    whole = family.extract(family.space.largest())
    for point in family.points:
        mask = mask_of(str(point.uniform))
        if mask is None or mask.group is None:
            continue
        network = family.extract(point.config)
        for decision in (d for d in family.space.decisions if d.axis == SPARSITY):
            stay, before = (model.get_parameter(decision.unit.name) != 0 for model in (network, whole))
            counts = stay.unflatten(-1, (-1, mask.group)).sum(-1)
            possible = before.unflatten(-1, (-1, mask.group)).sum(-1).clamp_max(mask.keep)
            if not (counts == possible).all():
                return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser()
    language = ("exactness", "trajectory", "joint", "recovery", "searched")
    encoder = ("retained", "distilled", "int8")
    names = ("exactness", "quarter", "trajectory", "speed", "retained", "distilled", "int8", "batch", *language[2:], "essential")
    parser.add_argument("--only", choices=names, nargs="+", default=None)
    parser.add_argument("--steps", type=int, default=200, help="of recovery, for each budget")
    parser.add_argument("--minilm", type=Path, help="the folder of all-MiniLM-L6-v2")
    parser.add_argument("--assets", type=Path, help="a folder with nlp-eval and text, for all-MiniLM-L6-v2")
    parser.add_argument("--environments", type=Path, help="the peers' own environments")
    given = parser.parse_args()
    if given.minilm and not given.assets:
        parser.error("--minilm needs --assets")
    with tempfile.TemporaryDirectory() as work:
        subject = minilm(given.minilm, given.assets, Path(work)) if given.minilm else default()
        # The recursion knows no network; structure with formats is shown on the default, what a task keeps on the encoder.
        others = language if given.minilm else encoder
        wanted = [name for name in names if (name in given.only if given.only else name not in others)]
        bench = cache(lambda: Bench.made(subject))
        contest = cache(lambda: Contest(subject, given.assets, given.environments))
        works: dict[str, Callable[[], Iterable[Section]]] = {
            "exactness": lambda: [exactness()],
            "quarter": lambda: [quarter(bench())],
            "trajectory": lambda: [trajectory(bench())],
            "speed": lambda: speed(subject, *subject.settings[0]),
            "batch": lambda: speed(subject, *subject.settings[1]),
            "retained": lambda: [retained(contest())],
            "distilled": lambda: [distilled(contest())],
            "joint": lambda: [joint()],
            "recovery": lambda: recovered(given.steps),
            "searched": searched,
            "essential": lambda: [essential(subject)],
            "int8": lambda: [integers(subject, Path(work))],
        }
        sections, status = list[Section](), 1
        page, command = ("structure-minilm", " MINILM=FOLDER ASSETS=FOLDER") if given.minilm else ("structure", "")
        for name in wanted:  # the page is there as far as it goes, should the next section take too long
            sections += works[name]()
            status = finish_page(page, f"Fewer parts: {subject.name}", f"make bench-structure{command}", sections, partly=bool(given.only))
    return status


if __name__ == "__main__":
    sys.exit(main())
