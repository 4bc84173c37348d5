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
from anyfit.encoding import Encoding
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
        return super().encode(weight, prepared, format_.alone if isinstance(format_, TableFormat) else format_)


@dataclass(frozen=True)
class Made:
    """An encoded run: KL by format, and what it took."""

    losses: dict[str, float]
    bits: dict[str, float]
    seconds: float
    num_weights: int
    stored: int
    """Weights of the blocks, and bytes of their variants without the floating-point ones."""


def section(progress: Progress) -> Section:
    ours, gptq, rounded = (_encoded(*what, progress) for what in (("any-precision", SIZES), ("gptq", INTEGERS), ("rtn", INTEGERS)))
    alone = {name: _encoded("any-precision", (name,), progress, Alone()) for name in SIZES}
    rows = []
    for name in SIZES:
        nested, own, bits = ours.losses[name], alone[name].losses[name], ours.bits[name]
        losses = (f"{nested:.5f}", f"{own:.5f}", f"{nested / own:.3f}", f"{_at(rounded, bits):.5f}", f"{_at(gptq, bits):.5f}")
        cells = (name, f"{bits:.2f}", f"{_last_table_only(ours, name):.2f}", *losses)
        rows.append(Row(cells, nested <= NEAR * own if _bits(name) <= FEW else None))
    separate = int(sum(_last_table_only(ours, name) for name in SIZES) * ours.num_weights / 8)
    one = f"one store, {ours.stored:,} bytes; a store for each size, with its last table alone, {separate:,}"
    rows.append(Row((one, *5 * ("",), f"{ours.stored / separate:.0%}", ""), ours.stored < separate))
    spent = f"encoding {len(SIZES)} sizes, {ours.seconds:.1f} s; GPTQ's {len(INTEGERS)}, {gptq.seconds:.1f} s"
    rows.append(Row((f"{spent}; k-means of rows of {COLUMNS}, all sizes, {_pace():.2f} s a million weights", *7 * ("",))))
    for row in rows:
        print("  ".join(cell for cell in row.cells if cell), flush=True)
    remark = (
        "Mean KL to the original on the report split, one size in all blocks of the embedded default, all else in 16 bits; bits are stored "
        "bits of the blocks' weights, tables and scales counted. Rows are 256 or 512 columns long here, so tables weigh 8 to 16 times what "
        "they do in rows of 4096. Nested: all sizes out of one stored matrix. By itself: the best codebook of that size alone. Rounding "
        f"and GPTQ: interpolated between integers ({INTEGERS[0]} to {INTEGERS[-1]}) at as many stored bits, or with the fewest they "
        f"have. Rows of up to {FEW} bits hold where nesting loses at most {NEAR:g} times what a codebook of its own does. Seconds are of a "
        "processor."
    )
    header = ("size", "stored bits", "last table alone", "KL nested", "by itself", "ratio", "rounding at these bits", "GPTQ at these bits")
    return Section("Nested codebooks (Any-Precision LLM)", header, rows, (remark,))


def _encoded(recipe: str, names: tuple[str, ...], progress: Progress, quantizer: Quantizer | None = None) -> Made:
    with _run(recipe, names) as (run, store):
        encoding = run.calibration_pass(store, run.stream(store), run.segments.calibration)
        assert isinstance(encoding, Encoding)
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
        return Made(losses, bits, seconds, weights, stored)


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
