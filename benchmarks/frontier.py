"""The frontier against the peers: each peer's model, and anyfit's within the very bytes of it.

Same networks, same calibration tokens, same evaluation. What peers make is kept in build/frontier/ and made again only
where what it was made from has changed.

    python benchmarks/frontier.py [--assets FOLDER] [--environments FOLDER] [--only SUBJECT] [--peers NAME,NAME] [--keep HOW]
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from integers import integer_section
from peers import environments, presets
from peers.results import Keep, Outcome, Refused, Result, evaluate, kept, kl_cell, our_code, perplexity_rise
from peers.subjects import EMBEDDED, LARGE, SMALL, Subject, subjects
from scipy.stats import spearmanr
from scores import random_configs
from table import FOLDER, Row, Section, finish_page

from anyfit import Family, pipeline, refinement
from anyfit.core.config import Config
from anyfit.core.effort import Effort
from anyfit.core.errors import BudgetError
from anyfit.family.family import is_family
from anyfit.family.manifest import Point
from anyfit.pipeline import Fit
from anyfit.progress import Silent
from anyfit.targets import targets
from anyfit.targets.llamacpp import read_model
from anyfit.tasks.language import Reference, kl

WORK = Path(__file__).parent.parent / "build" / "frontier"
PEERS = (presets.PEER, environments.ROUNDING, *environments.ENVIRONMENTS)
HALF_UP_TO_BITS = 5.0
"""Up to this size anyfit's KL must be at most half of a preset's; beyond it, and against other peers, not higher."""
NUM_BUDGETS, SLOWEST_BUDGETS = 64, 1.0
NUM_RANDOM, LOWEST_CORRELATION = 50, 0.95
NUM_SOME = 32
"""Report segments that random configs are measured on."""
LOWEST_MIXED_GAIN, MOST_BITS_OFF = 0.10, 0.75
RECIPE, EFFORT = "gptq", Effort.HIGH
REFINED_BITS = (2.7, 3.5)
"""Of the presets nearest to these sizes, anyfit's model is also refined."""


@dataclass(frozen=True)
class Pair:
    """A peer's outcome, and anyfit's within its bytes: None where the family has nothing so small, or nothing to match."""

    theirs: Outcome
    ours: Result | None


@dataclass(frozen=True)
class Comparison:
    """One network, its family, and what the peers that can take this network made of it."""

    subject: Subject
    fitted: Family
    pairs: Sequence[Pair]


def family(subject: Subject, *, keep: Keep) -> Family:
    """One run for all budgets, over the subject's own tokens; kept for as long as our code stays as it is.

    It is made for llama.cpp, but for a network that was padded to whole groups: its short rows leave few types there,
    and its peers store plain integer groups, which is what the transformers target offers.
    """
    target = targets.get("transformers" if subject.is_padded else presets.PEER)
    text = subject.segments
    counts = (len(text.calibration), len(text.search), len(text.report))
    wanted = pipeline.Settings(target.name, target.menu(EFFORT), RECIPE, text.calibration.shape[1], *counts, 0, EFFORT)
    output = subject.work / f"{target.name}-{our_code()}.family"
    if keep is Keep.FRESH or not is_family(output):
        Fit(subject.checkpoint, text, wanted, Silent()).run(output, restart=keep is Keep.FRESH, force=True)
    return Family.open(output)


def matched(subject: Subject, fitted: Family, size: int) -> Result | Refused:
    """The family's model within `size` bytes, written, read back and measured; refined first where the network is tiny."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model{targets.get(fitted.target).suffix}")
        try:
            if subject.is_tiny:
                fitted = Family.open(shutil.copytree(fitted.path, Path(folder, "copy.family")))
                refinement.refine(fitted, f"{size} B", model=subject.folder)
                fitted = Family.open(fitted.path)
            export = fitted.export(f"{size} B", path, check=False)
        except BudgetError as error:
            return Refused("anyfit", f"{size} B", error.problem)
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        assert sum(file.stat().st_size for file in files) == export.bytes_ <= size
        model = read_model(path)[0] if path.is_file() else fitted.extract(export.point.config)
        quality, losses = evaluate(model, subject.reference)
    return Result("anyfit", f"{size} B", export.bytes_, export.bits, quality, losses, export.seconds)


def pairs(subject: Subject, fitted: Family, theirs: Iterable[Outcome], *, keep: Keep) -> Iterator[Pair]:
    """Each outcome beside anyfit's; measured once for each size of each family."""
    for outcome in theirs:
        ours = None
        if isinstance(outcome, Result):
            path, size = subject.work / "anyfit" / f"{fitted.digest[:16]}-{outcome.bytes_}.json", outcome.bytes_
            found = kept(
                path, {"family": fitted.digest, "refined": subject.is_tiny}, lambda size=size: matched(subject, fitted, size), keep=keep
            )
            ours = found if isinstance(found, Result) else None
        pair = Pair(outcome, ours)
        print("  ".join(pair_row(subject, pair).cells), flush=True)
        yield pair


def pair_row(subject: Subject, pair: Pair) -> Row:
    """KL and perplexity of both. The perplexities' difference is judged by its error over segments."""
    theirs, ours = pair.theirs, pair.ours
    if isinstance(theirs, Refused):
        return Row((subject.name, theirs.peer, theirs.setting, *([""] * 8), f"made none: {theirs.reason}"))
    known = (subject.name, theirs.peer, theirs.setting, f"{theirs.bytes_}", f"{theirs.bits:.2f}")
    if ours is None:
        empty = ("none so small", kl_cell(theirs), "", "", f"{theirs.quality.perplexity:.3f}", "")
        return Row((*known, *empty, theirs.detail), holds=False)
    ratio = ours.quality.kl_mean / theirs.quality.kl_mean
    rise, error = perplexity_rise(theirs.losses, ours.losses)
    perplexities = (f"{theirs.quality.perplexity:.3f}", f"{ours.quality.perplexity:.3f} ({rise:+.2%} ± {error:.2%})")
    cells = (*known, f"{ours.bytes_}", kl_cell(theirs), kl_cell(ours), f"{ratio:.2f}", *perplexities, theirs.detail)
    most = 0.5 if theirs.peer == presets.PEER and theirs.bits <= HALF_UP_TO_BITS else 1.0
    return Row(cells, holds=ratio <= most and rise <= error and ours.bytes_ <= theirs.bytes_)


def peers_section(comparison: Comparison) -> Section:
    header = (
        "model",
        "peer",
        "setting",
        "bytes",
        "bits",
        "bytes anyfit",
        "KL",
        "KL anyfit",
        "ratio",
        "ppl",
        "ppl anyfit",
        "what the peer stores",
    )
    subject = comparison.subject
    original = subject.reference.quality
    remark = f"The original's perplexity: {original.perplexity:.3f} ± {original.perplexity_stderr:.3f}."
    return Section(subject.name, header, [pair_row(subject, pair) for pair in comparison.pairs], (remark,))


def picture(comparisons: Sequence[Comparison], path: Path) -> None:
    """KL against bytes: the family as a line, peers as points. One panel a network."""
    figure, axes = plt.subplots(1, len(comparisons), figsize=(6.5 * len(comparisons), 5), squeeze=False, layout="constrained")
    for axis, comparison in zip(axes[0], comparisons, strict=True):
        points = [(p.bytes_, p.report.loss) for p in comparison.fitted.frontier if p.report is not None]
        points += [(pair.ours.bytes_, pair.ours.quality.kl_mean) for pair in comparison.pairs if pair.ours is not None]
        axis.plot(*zip(*sorted(points), strict=True), "-o", color="black", markersize=3, label="anyfit")
        results = [pair.theirs for pair in comparison.pairs if isinstance(pair.theirs, Result)]
        for index, peer in enumerate(dict.fromkeys(result.peer for result in results)):
            own = [result for result in results if result.peer == peer]
            sizes, divergences = [r.bytes_ for r in own], [r.quality.kl_mean for r in own]
            axis.scatter(sizes, divergences, s=28, marker="osv^Dx*"[index % 7], label=peer, zorder=3)
        axis.set(title=comparison.subject.name, xlabel="bytes stored", ylabel="KL to the original, nats per token", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def budgets_row(subject: Subject, fitted: Family) -> Row:
    """Many budgets from a finished family, opened anew."""
    sizes = np.geomspace(fitted.space.bytes_(fitted.space.smallest()), fitted.space.bytes_(fitted.space.largest()), NUM_BUDGETS)
    began = time.perf_counter()
    opened = Family.open(fitted.path)
    for size in sizes:
        opened.select(f"{math.ceil(size)} B")
    seconds = time.perf_counter() - began
    return Row((subject.name, f"{NUM_BUDGETS} budgets from the family", f"{seconds:.2f} s"), holds=seconds < SLOWEST_BUDGETS)


def mixed_rows(subject: Subject, fitted: Family) -> Iterator[Row]:
    """The uniform settings nearest to 3 and 4 bits, where there are any so near, against the best mix within their bytes."""
    uniform = [p for p in fitted.points if p.uniform and p.report and not p.refined]
    for bits in (3, 4):
        point = min(uniform, key=lambda p: abs(p.bits - bits))
        if abs(point.bits - bits) > MOST_BITS_OFF:
            continue
        mixed = fitted.select_unrefined(f"{point.bytes_} B")
        if mixed.refined:
            continue
        divergence = _divergence(subject, fitted, mixed)
        lower = 1 - divergence / point.report.loss
        measured = f"KL {divergence:.5f} against {point.report.loss:.5f}: {lower:.0%} lower"
        yield Row(
            (subject.name, f"mixed against {point.uniform} everywhere, {point.bits:.2f} bits", measured), holds=lower >= LOWEST_MIXED_GAIN
        )


def _divergence(subject: Subject, fitted: Family, point: Point) -> float:
    return point.report.loss if point.report else kl(fitted.extract(point.config), subject.reference)


def correlation_row(subject: Subject, fitted: Family) -> Row:
    """The family's predictions over random configs, against their measured KL."""
    rng = np.random.default_rng(1)
    configs: list[Config] = []
    while len(configs) < NUM_RANDOM:
        configs += random_configs(fitted.space, rng)
    configs = configs[:NUM_RANDOM]
    predicted = [fitted.point(config).predicted for config in configs]
    some = Reference.of(subject.checkpoint.load(), subject.segments.report[:NUM_SOME])
    measured = [kl(fitted.extract(config), some) for config in configs]
    correlation = float(spearmanr(predicted, measured).statistic)
    what = f"rank correlation, predicted and measured, {NUM_RANDOM} random configs"
    return Row((subject.name, what, f"{correlation:.3f}"), holds=correlation >= LOWEST_CORRELATION)


def refined_rows(comparison: Comparison) -> Iterator[Row]:
    """Sizes that somebody asks for: the family's answer, and the same bytes once `anyfit refine` has run."""
    subject = comparison.subject
    results = [pair.theirs for pair in comparison.pairs if isinstance(pair.theirs, Result)]
    for size in {min(results, key=lambda r, b=bits: abs(r.bits - b)).bytes_: None for bits in REFINED_BITS}:
        with tempfile.TemporaryDirectory() as folder:
            fitted = Family.open(shutil.copytree(comparison.fitted.path, Path(folder, "copy.family")))
            chosen = fitted.select_unrefined(f"{size} B")
            if chosen.refined:
                continue
            before = _divergence(subject, fitted, chosen)
            began = time.process_time()
            made = refinement.refine(fitted, f"{size} B", model=subject.folder)
            seconds = time.process_time() - began
        after = made.point.report.loss if made.kept and made.point.report else before
        measured = (f"{before:.5f}", f"{after:.5f}", f"{1 - after / before:.0%}", f"{seconds:.0f}")
        cells = (subject.name, f"{size}", f"{chosen.bits:.2f}", *measured)
        print("  ".join(cells), flush=True)
        yield Row(cells, holds=after <= before)


def refined_section(comparisons: Sequence[Comparison]) -> Section:
    header = ("model", "budget, bytes", "bits", "KL of the family's answer", "KL refined", "lower by", "CPU s")
    rows = [row for comparison in comparisons for row in refined_rows(comparison)]
    return Section("Refining a size that is asked for", header, rows, ("`anyfit refine FAMILY --budget`, at unchanged formats and bytes.",))


def family_section(comparisons: Sequence[Comparison]) -> Section:
    """What one family gives: budgets at once, mixes that beat uniform formats, predictions that can be trusted."""
    rows: list[Row] = []
    for comparison in comparisons:
        subject, fitted = comparison.subject, comparison.fitted
        rows += [budgets_row(subject, fitted), *mixed_rows(subject, fitted), correlation_row(subject, fitted)]
    remarks = (
        f"{NUM_BUDGETS} budgets hold below {SLOWEST_BUDGETS:.0f} s, mixes with a KL lower by {LOWEST_MIXED_GAIN:.0%} than one format "
        f"everywhere, correlations from {LOWEST_CORRELATION}.",
    )
    return Section("One family", ("model", "what", "measured"), rows, remarks)


def theirs(subject: Subject, peer: str, args: argparse.Namespace) -> Iterator[Outcome]:
    if peer == presets.PEER:
        return presets.outcomes(subject, keep=args.keep)
    return environments.outcomes(subject, peer, args.environments, keep=args.keep)


def compared(subject: Subject, args: argparse.Namespace) -> list[Comparison]:
    """All pairs of a subject; where some peers need it padded, those with its padded twin."""
    split: dict[str, tuple[Subject, list[str]]] = {}
    for peer in args.peers:
        own = subject if peer == presets.PEER else subject.padded
        split.setdefault(own.name, (own, []))[1].append(peer)
    comparisons = []
    ours = Keep.FRESH if args.keep is Keep.FRESH else Keep.REUSE
    for own, peers in split.values():
        fitted = family(own, keep=ours)
        found = [pair for peer in peers for pair in pairs(own, fitted, theirs(own, peer, args), keep=ours)]
        comparisons.append(Comparison(own, fitted, found))
    return comparisons


def remarks() -> tuple[str, ...]:
    return (
        "Mean KL to the original in nats per token and perplexity, both on held-out segments, ± standard error over segments. Every peer "
        "gets the same calibration tokens. Bytes are all that is stored: of llama.cpp and anyfit the GGUF file with its tokenizer, "
        "or the weight files where anyfit writes a folder; of the "
        "others their quantised linears by formula (codes, 16-bit scales, zero points) and 16 bits for every other number, or their own "
        "file where that is smaller. Bits are those of all tensors over all parameters. anyfit's budget is the peer's bytes, and its "
        "model is what the family (fitted at high effort) gives for it at once; only of the 260K network, padded or "
        "not, was each size refined first (`anyfit refine --budget`, a minute each).",
        f"A row holds where anyfit's KL is at most half of a llama.cpp preset's up to {HALF_UP_TO_BITS:.0f} bits, not higher beyond; not "
        "higher than any other peer's; and where its perplexity is not higher than the peer's by more than the standard error of the "
        "difference over segments.",
        "![The frontier of each network, and the peers](frontier.png)",
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, default=None, help="a folder with further models")
    parser.add_argument("--environments", type=Path, default=Path("build/peers"), help="where each peer's environment is, by its name")
    parser.add_argument("--only", choices=(EMBEDDED, LARGE, SMALL), default=None, help="a single subject")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help="some of " + ",".join(PEERS))
    parser.add_argument(
        "--keep", type=Keep, default=Keep.REUSE, help="reuse what peers made in earlier runs, make it fresh, or take only that"
    )
    args = parser.parse_args()
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    if missing := [name for name in args.peers if name in environments.ENVIRONMENTS and not (args.environments / name).is_dir()]:
        parser.error(f"{', '.join(missing)}: no environment in {args.environments} (make peers)")
    return args


def main() -> int:
    args = arguments()
    comparisons: list[Comparison] = []
    sections: list[Section] = []
    for subject in subjects(args.assets, WORK):
        if args.only not in (None, subject.name):
            continue
        made = compared(subject, args)
        comparisons += made
        sections += [peers_section(comparison) for comparison in made]
        if subject.name == SMALL and "autoround" in args.peers:
            sections.append(integer_section(subject.padded, theirs(subject.padded, "autoround", args), keep=args.keep))
    picture(comparisons, FOLDER / "frontier.png")
    plain = [c for c in comparisons if not c.subject.is_padded]
    sections += [family_section(plain), refined_section([c for c in plain if c.subject.name != SMALL])]
    command = "make bench-frontier ASSETS=FOLDER"
    return finish_page("frontier", "The frontier against the peers", command, sections, remarks())


if __name__ == "__main__":
    sys.exit(main())
