"""Codebooks of rows, all sizes in one stored matrix (Any-Precision LLM): against codebooks of their own, and GPTQ's integers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from table import Row, Section
from torch import Tensor

from anyfit.api import prepare
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.config import Config
from anyfit.family.store import VARIANTS, Store
from anyfit.formats import INTEGER_BITS, formats
from anyfit.formats.base import Format
from anyfit.formats.fitting_tables import entries, fit_tables
from anyfit.formats.table import TableFormat
from anyfit.pipeline import Fit
from anyfit.progress import Progress
from anyfit.quantizers.base import Encoded, Quantizer
from anyfit.quantizers.rtn import RoundToNearest
from anyfit.tasks.language import Reference, measure

FLOAT = "BF16"
SIZES = tuple(f"table{bits}" for bits in range(2, 7))
"""More bits have longer tables than the embedded default has rows."""
INTEGERS = tuple(f"int{bits}_{kind}" for bits in INTEGER_BITS for kind in ("sym", "asym"))
NEAR, FEW = 1.25, 4
"""Times what a codebook of its own loses, that a nested one may, of so few bits: of more, a row has less than 16 weights for an entry."""
NUM_WEIGHTS, COLUMNS = 2**21, 4096


class Alone(RoundToNearest):
    """The best codebook of one size, found together."""

    def encode(self, weight: Tensor, prepared: InputStatistics, format_: Format) -> Encoded:
        if not isinstance(format_, TableFormat):
            return super().encode(weight, prepared, format_)
        data = format_.pack(*fit_tables(weight, prepared.diagonal, format_.num_bits, seed=format_.num_bits))
        return Encoded(data, self.errors(weight - format_.decode(data), prepared))


@dataclass(frozen=True)
class Made:
    """An encoded run: KL by format, and what it took."""

    losses: dict[str, float]
    bits: dict[str, float]
    seconds: float
    stored: int
    """Bytes of the blocks' variants, without the floating-point ones."""


def section(progress: Progress) -> Section:
    ours = _encoded("any-precision", SIZES, progress)
    theirs = _encoded("gptq", INTEGERS, progress)
    alone = {name: _encoded("any-precision", (name,), progress, Alone()) for name in SIZES}
    rows = []
    for name in SIZES:
        nested, own = ours.losses[name], alone[name].losses[name]
        last, at = _last_table_only(ours, name), ours.bits[name]
        rival, single = _at(theirs, at), _at(theirs, last)
        cells = (name, f"{at:.2f}", f"{nested:.5f}", f"{own:.5f}", f"{nested / own:.3f}", f"{rival:.5f}", f"{last:.2f}", f"{single:.5f}")
        rows.append(Row(cells, nested <= NEAR * own if _bits(name) <= FEW else None))
    separate = sum(run.stored for run in alone.values())
    one = (f"one store, {ours.stored:,} bytes", "", "", f"{separate:,} in stores of their own", f"{ours.stored / separate:.2f}", "", "", "")
    rows.append(Row(one, ours.stored < separate))
    spent = (f"encoding, {ours.seconds:.1f} s", "", "", "", "", f"{theirs.seconds:.1f} s for {len(INTEGERS)} formats", "", "")
    rows += [Row(spent), Row((f"k-means of {COLUMNS} columns, 2 to 8 bits: {_pace():.2f} s a million weights", *7 * ("",)))]
    for row in rows:
        print("  ".join(cell for cell in row.cells if cell), flush=True)
    for name in INTEGERS:
        print(f"{name}  {theirs.bits[name]:.2f} bits  KL {theirs.losses[name]:.5f}", flush=True)
    remark = (
        "Mean KL to the original on the report split, one size in all blocks of the embedded default, all else in 16 bits; bits are stored "
        "bits of the blocks' weights, tables and scales counted. Rows are 256 or 512 columns long here, so tables weigh 8 to 16 times what "
        "they do in rows of 4096. Nested: all sizes out of one stored matrix. By itself: the best codebook of that size alone. GPTQ: "
        f"interpolated between its integers ({INTEGERS[0]} to {INTEGERS[-1]}) at as many stored bits; the last two columns are for a file "
        f"that holds the last table alone. A row of up to {FEW} bits holds where nesting loses at most {NEAR:g} times what a codebook of "
        "its own does. Seconds are of a processor."
    )
    header = ("size", "stored bits", "KL nested", "by itself", "ratio", "GPTQ at these bits", "bits, last table alone", "GPTQ at those")
    return Section("Nested codebooks (Any-Precision LLM)", header, rows, (remark,))


def _encoded(recipe: str, names: tuple[str, ...], progress: Progress, quantizer: Quantizer | None = None) -> Made:
    with _run(recipe, names) as (run, store):
        encoding = run.encoding(store, run.stream(store), run.segments.calibration)
        encoding = encoding if quantizer is None else replace(encoding, quantizer=quantizer)
        began = time.process_time()
        encoding.run()
        seconds = time.process_time() - began
        inside = [d for d in run.space.decisions if d.unit.weights[0].block is not None]
        reference, elastic = Reference.of(run.model, run.segments.report), run.elastic_model(store)
        losses = {}
        for name in names:
            config = Config({d.key: name if d in inside else FLOAT for d in run.space.decisions})
            losses[name] = measure(elastic.set(config), reference).kl_mean
        weights = sum(d.unit.num_weights for d in inside)
        bits = {name: 8 * sum(formats.get(name).bytes_(w.shape) for d in inside for w in d.unit.weights) / weights for name in names}
        files = (store.folder / VARIANTS / f"{w.name}.safetensors" for d in inside for w in d.unit.weights)
        stored = sum(file.stat().st_size - 2**14 for file in files) - 2 * weights
        return Made(losses, bits, seconds, stored)


@contextmanager
def _run(recipe: str, names: tuple[str, ...]) -> Iterator[tuple[Fit, Store]]:
    with tempfile.TemporaryDirectory() as folder:
        yield prepare(target="transformers", recipe=recipe, formats=(FLOAT, *names), device="cpu"), Store(Path(folder))


def _at(run: Made, bits: float) -> float:
    """What the best of these formats lose at so many bits, on a line through the logarithms of those that no other beats."""
    order, best = sorted(run.losses, key=lambda name: (run.bits[name], run.losses[name])), list[str]()
    for name in order:
        if not best or run.losses[name] < run.losses[best[-1]]:
            best.append(name)
    return float(np.exp(np.interp(bits, [run.bits[name] for name in best], [np.log(run.losses[name]) for name in best])))


def _last_table_only(run: Made, name: str) -> float:
    """Stored bits of a size, had its rows no smaller tables."""
    codes = _bits(name)
    return codes + (run.bits[name] - codes) * 2**codes / entries(codes)


def _bits(name: str) -> int:
    format_ = formats.get(name)
    assert isinstance(format_, TableFormat)
    return format_.num_bits


def _pace() -> float:
    """Seconds for a million weights, all sizes from two to eight bits."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(NUM_WEIGHTS // COLUMNS, COLUMNS, generator=generator) * 0.02
    importance = torch.rand(COLUMNS, generator=generator)
    fit_tables(weight[:1], importance, 8)
    began = time.process_time()
    fit_tables(weight, importance, 8)
    return (time.process_time() - began) / (NUM_WEIGHTS / 1e6)
