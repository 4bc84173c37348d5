"""What each part brings: one network at equal bytes, each row the one that it is compared with and one part more.

All matrices of the blocks are stored in one format; the embedding, the head and the norms stay as they are.

    python benchmarks/ablation.py [--assets FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path

import mixing
import numpy as np
import prepasses
import torch
from ablated import NUM_SCALES, Blind, EveryZeroPoint, OwnZeroPoint, PlainGPTQ, ScalesAround
from peers.subjects import LENGTH, SMALL, Subject, subjects
from table import Row, Section, finish_page
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.architectures.base import Architecture
from anyfit.calibration.collect import collect
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.units import Weight
from anyfit.formats import formats
from anyfit.formats.base import GridFormat
from anyfit.progress import Silent
from anyfit.quantizers import gptq
from anyfit.quantizers.base import Quantizer
from anyfit.quantizers.rtn import RoundToNearest
from anyfit.tasks.language import Reference
from anyfit.tuning import refining, sequential, signround
from anyfit.tuning.coded import Coded, Matrix

FORMATS = ("Q2_K", "Q3_K", "Q4_K")
COARSE = FORMATS[:2]
NUM_CALIBRATION, NUM_REPORT = 64, 48
CLEAR_GAIN, CLEAR_ERRORS = 0.05, 3
"""A part that isn't in the product would have to lower the KL by this share and so many standard errors on every network."""

Data = dict[str, Tensor]
"""By a matrix's name, its bytes."""


@dataclass
class Lab:
    """A network, its text, and by row and format what was made of it so far: bytes, and KL on each held-out segment."""

    subject: Subject
    original: PreTrainedModel
    calibration: Tensor
    made: dict[tuple[str, str], Data] = field(default_factory=dict)
    found: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, subject: Subject) -> Lab:
        model = subject.checkpoint.load().requires_grad_(False)
        return cls(subject, model, subject.segments.calibration[:NUM_CALIBRATION])

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self.original)

    @cached_property
    def report(self) -> Reference:
        return Reference.of(self.original, self.subject.segments.report[:NUM_REPORT])

    @cached_property
    def search(self) -> Reference:
        return Reference.of(self.original, self.subject.segments.search)

    @cached_property
    def reading(self) -> Reference:
        """What tuning reads."""
        return Reference.of(self.original, self.calibration)

    @cached_property
    def statistics(self) -> dict[str, InputStatistics]:
        return self.statistics_of(self.original)

    def statistics_of(self, network: PreTrainedModel) -> dict[str, InputStatistics]:
        return collect(network, self.architecture, self.subject.block_weights, self.calibration, progress=Silent())

    def encode(
        self, network: PreTrainedModel, statistics: Mapping[str, InputStatistics], quantizer: Quantizer, format_: GridFormat
    ) -> Data:
        """All matrices of the blocks of `network`, each by itself."""
        data = {}
        for input_, group in groupby(self.subject.block_weights, key=lambda weight: weight.input):
            assert input_ is not None
            prepared = quantizer.prepare(statistics[input_])
            data.update({w.name: quantizer.encode(network.get_parameter(w.name).detach(), prepared, format_).data for w in group})
        return data

    @torch.inference_mode()
    def divergences(self, network: PreTrainedModel, data: Data, format_: GridFormat) -> np.ndarray:
        """Mean KL per token to the original of each held-out segment, when `network` has these matrices."""
        values = {name: format_.decode(part) for name, part in data.items()}
        assert self.report.log_probs is not None
        found = []
        for tokens, expected in zip(self.report.tokens.split(8), self.report.log_probs.split(8), strict=True):
            logits = functional_call(network, values, kwargs={"input_ids": tokens, "use_cache": False}).logits[:, :-1]
            found.append(kl_div(logits.float().log_softmax(-1), expected, log_target=True, reduction="none").sum(-1).mean(-1))
        return torch.cat(found).double().numpy()


Make = Callable[[Lab, GridFormat], tuple[PreTrainedModel, Data]]
"""A network that computes what the original does, and the bytes of its blocks' matrices."""


def rounded(quantizer: Quantizer) -> Make:
    return lambda lab, format_: (lab.original, lab.encode(lab.original, lab.statistics, quantizer, format_))


def in_order(start: str, share: float) -> Make:
    """Matrices solved again for the inputs that arrive, from the row `start`."""

    def make(lab: Lab, format_: GridFormat) -> tuple[PreTrainedModel, Data]:
        data: Data = {}

        def encode(weights: Sequence[Weight], targets: Sequence[Tensor], statistics: InputStatistics) -> list[Tensor]:
            prepared = gptq.QUANTIZER.prepare(statistics)
            data.update({w.name: gptq.QUANTIZER.encode(t, prepared, format_).data for w, t in zip(weights, targets, strict=True)})
            return [format_.decode(data[weight.name]) for weight in weights]

        stored = copy.deepcopy(lab.original)
        for name, part in lab.made[start, format_.name].items():
            stored.get_parameter(name).copy_(format_.decode(part))
        sequential.resolve(
            stored,
            lab.original,
            lab.architecture,
            lab.subject.block_weights,
            lab.calibration[: refining.Settings().num_segments],
            encode,
            share=share,
            progress=Silent(),
        )
        return lab.original, data

    return make


def tuned(start: str) -> Make:
    """Codes and halves of the row `start`, moved by the sign of their gradients."""

    def make(lab: Lab, format_: GridFormat) -> tuple[PreTrainedModel, Data]:
        given = {
            name: Matrix(Coded(format_, *format_.read(part)), lab.original.get_parameter(name))
            for name, part in lab.made[start, format_.name].items()
        }
        result = signround.tune(lab.original, given, lab.reading, lab.search, settings=signround.Settings(), progress=Silent())
        return lab.original, {name: entry.data for name, entry in result.coded.items()}

    return make


def rewritten(rewrite: prepasses.Rewriting, quantizer: Quantizer = gptq.QUANTIZER) -> Make:
    """The network rewritten, then solved as it would be otherwise."""

    def make(lab: Lab, format_: GridFormat) -> tuple[PreTrainedModel, Data]:
        network = copy.deepcopy(lab.original)
        rewrite(network, lab.statistics, format_)
        prepasses.check(network, lab.original, lab.subject.segments.search[:2])
        return network, lab.encode(network, lab.statistics_of(network), quantizer, format_)

    return make


@dataclass(frozen=True)
class Part:
    """One row: what is added to the row `against`, and what became of it.

    `at`: the formats it is measured in. `claimed`: those in which it must not be worse than the row before by more than the
    standard error of the difference, because the product uses it there.
    """

    name: str
    against: str | None
    make: Make
    fate: str
    at: tuple[str, ...] = FORMATS
    claimed: tuple[str, ...] = ()


PLAIN, WEIGHTED, PAPER = (
    "plain rounding",
    "+ scales weighted by the inputs' mean squares",
    "+ errors made good by later columns, as in the paper",
)
ORDERED, DAMPED = "+ columns by falling mean square", "+ damping of 5 %"
COMPENSATED, SOLVED = "+ scales weighted by sqrt(H_jj / U_jj²)", "+ coarse grids solved three times: `gptq`"
ARRIVING, QUARTER, HALF, WHOLE = (
    "+ inputs that really arrive",
    "+ a quarter of the way to the target",
    "+ half of it",
    "+ all of it",
)
QUANTIZER = "in the product: `gptq`"
REFINE = "in the product: `refine`"
STEP, NOTHING = "to compare with", "left out: no clear gain"


def steps() -> list[Part]:
    """From plain rounding to the product."""
    return [
        Part(PLAIN, None, rounded(Blind()), STEP),
        Part(WEIGHTED, PLAIN, rounded(RoundToNearest()), "in the product: `rtn`", claimed=FORMATS),
        Part(PAPER, WEIGHTED, rounded(PlainGPTQ()), QUANTIZER, claimed=FORMATS),
        Part(ORDERED, PAPER, rounded(PlainGPTQ(ordered=True)), QUANTIZER, claimed=FORMATS),
        Part(DAMPED, ORDERED, rounded(PlainGPTQ(ordered=True, damping=gptq.DAMPING)), QUANTIZER, claimed=FORMATS),
        Part(
            COMPENSATED, DAMPED, rounded(PlainGPTQ(ordered=True, damping=gptq.DAMPING, compensated=True)), QUANTIZER, claimed=FORMATS
        ),
        Part(SOLVED, COMPENSATED, rounded(gptq.QUANTIZER), QUANTIZER + ", below four bits", claimed=COARSE),
        Part(ARRIVING, SOLVED, in_order(SOLVED, 0.0), REFINE + ", for the target's sake", COARSE),
        Part(QUARTER, ARRIVING, in_order(SOLVED, 0.25), STEP, FORMATS[:1]),
        Part(HALF, QUARTER, in_order(SOLVED, 0.5), STEP, FORMATS[:1]),
        Part(WHOLE, ARRIVING, in_order(SOLVED, sequential.SHARE), REFINE, COARSE, COARSE),
        Part("+ codes and halves moved by signs of gradients: `refine`", WHOLE, tuned(WHOLE), REFINE, COARSE, COARSE),
        Part("`gptq`, + codes and halves moved by signs of gradients", SOLVED, tuned(SOLVED), STEP, FORMATS[:1]),
    ]  # fmt: skip


def rewritings() -> list[Part]:
    """What might make the network easier to round; each against `gptq` alone."""

    def part(name: str, rewrite: prepasses.Rewriting, fate: str) -> Part:
        return Part(name, SOLVED, rewritten(rewrite), fate)

    awq, everywhere = (partial(prepasses.scale_columns, inner=inner) for inner in (False, True))
    return [
        Part("plain rounding, + columns scaled behind the norms (AWQ)", WEIGHTED, rewritten(awq, RoundToNearest()), STEP),
        part("`gptq`, + columns scaled behind the norms (AWQ)", awq, NOTHING),
        part("`gptq`, + columns scaled there, at v and o, up and down", everywhere, NOTHING),
        part("`gptq`, + columns scaled behind the norms (SmoothQuant)", prepasses.smooth_columns, "left out: at best the same"),
        part("`gptq`, + residual stream rotated", lambda network, *_: prepasses.rotate_stream(network), NOTHING),
        part("`gptq`, + values of each head rotated", lambda network, *_: prepasses.rotate_heads(network), NOTHING),
    ]


def measured(lab: Lab, parts: Sequence[Part]) -> list[Row]:
    """One format after the other; what is made serves the rows that start from it."""
    found = lab.found
    for format_ in FORMATS:
        for part in (part for part in parts if format_ in part.at):
            began = time.perf_counter()
            grid = formats.get(format_)
            network, data = part.make(lab, grid)
            lab.made[part.name, format_] = data
            found[part.name, format_] = lab.divergences(network, data, grid)
            print(
                f"{lab.subject.name}  {format_}  {part.name}  {_mean(found[part.name, format_])}  {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return [row(part, found) for part in parts]


def row(part: Part, found: Mapping[tuple[str, str], np.ndarray]) -> Row:
    """A part in every format: its KL, and the change from what it is compared with."""
    cells, holds = [part.name, part.against or ""], []
    for format_ in FORMATS:
        own, other = found.get((part.name, format_)), found.get((part.against or "", format_))
        cells.append("" if own is None else _mean(own))
        if own is None or other is None:
            cells.append("")
            continue
        change, error = _change(own, other)
        cells.append(f"{change:+.1%} ± {error:.1%}")
        holds += [change <= error] if format_ in part.claimed else []
    return Row((*cells, part.fate), all(holds) if holds else None)


def _change(own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Relative difference of the means over segments, and its standard error from the paired differences."""
    return float(own.mean() / other.mean() - 1), _stderr(own - other) / float(other.mean())


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.5f} ± {_stderr(values):.5f}"


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


REMARKS = (
    f"Mean KL to the original in nats per token on {NUM_REPORT} held-out segments of {LENGTH} tokens, ± standard error over segments; "
    f"{NUM_CALIBRATION} calibration segments. `change`: from the row that a row is compared with, ± the standard error of the paired "
    "differences. All matrices of the blocks are in one format, so that all rows of a column have the same bytes; the embedding, the "
    "head and the norms stay as they are.",
    "A row that is in the product holds where it isn't worse than the row before by more than the error of the difference, in each format "
    "that it is meant for. What takes longest is measured in the coarser formats only, and what is compared with for interest in one.",
    f"What is left out would have had to lower the KL by {CLEAR_GAIN:.0%} and by {CLEAR_ERRORS} standard errors on both networks. All "
    "rewritings are exact: the benchmark asserts that the logits stay the same. A rotated residual stream needs a head of its own: where "
    "the head is tied to the embedding, as in the embedded default, it must be stored a second time, and that row has more bytes.",
)
NEAREST, NEIGHBOURS = "the whole number nearest to each clipped range's", "+ both neighbours of the best"


def zero_points(lab: Lab) -> list[Row]:
    """Two-bit integers in groups of 32, solved by `gptq`, with zero points looked for ever more thoroughly."""
    ways = {
        NEAREST: (None, OwnZeroPoint(), STEP),
        NEIGHBOURS: (NEAREST, formats.get("int2_asym"), "in the product"),
        "+ scales around the best": (NEIGHBOURS, ScalesAround(), "left out"),
        f"every zero point, {NUM_SCALES} scales each": (NEIGHBOURS, EveryZeroPoint(), "left out"),
    }
    found: dict[str, np.ndarray] = {}
    rows = []
    for name, (against, grid, fate) in ways.items():
        found[name] = lab.divergences(*rounded(gptq.QUANTIZER)(lab, grid), grid)
        change, error = _change(found[name], found[against]) if against else (0.0, 0.0)
        cells = (lab.subject.name, name, _mean(found[name]), f"{change:+.1%} ± {error:.1%}" if against else "", fate)
        print("  ".join(cells), flush=True)
        rows.append(Row(cells, change <= error if fate == "in the product" else None))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, default=None, help="a folder with further models")
    args = parser.parse_args()
    header = ("row", "compared with", *(part for name in FORMATS for part in (f"KL {name}", "change")), "what became of it")
    sections, zeros = [], []
    with tempfile.TemporaryDirectory() as work:
        for subject in subjects(args.assets, Path(work)):
            lab = Lab.of(subject.padded if subject.name == SMALL else subject)
            zeros += zero_points(lab)
            if subject.name == SMALL:
                continue
            sections += [
                Section(f"{subject.name}: from plain rounding to the product", header, measured(lab, steps())),
                Section(f"{subject.name}: the network rewritten first", header, measured(lab, rewritings())),
                mixing.section(subject),
            ]
    sections.append(Section("Zero points of two-bit integers", ("network", "zero points", "KL", "change", "what became of it"), zeros))
    return finish_page("ablation", "What each part brings", "make bench-ablation ASSETS=FOLDER", sections, REMARKS)


if __name__ == "__main__":
    sys.exit(main())
