"""One store of integers for all sizes of a language model (Double Rounding), against a store that has each size by itself."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from table import Row, Section

from anyfit.api import prepare
from anyfit.family.store import VARIANTS, Store
from anyfit.formats import formats
from anyfit.progress import Progress
from anyfit.recipes.double_rounding import FORMATS
from anyfit.tasks.language import Reference, measure

NAMES = FORMATS["transformers"][0]
MOST_BITS = 8.25
"""A weight, on disk: integers of eight bits, a half for 128 of them, and what files say of themselves."""


@dataclass(frozen=True)
class Made:
    """What the files of variants take, by their sizes on disk; KL by format."""

    bytes_: int
    num_weights: int
    losses: dict[str, float]
    sizes: dict[str, int]
    """Bytes of each format alone."""

    @property
    def bits(self) -> float:
        return 8 * self.bytes_ / self.num_weights


def section(progress: Progress) -> Section:
    nested, apart = (_made(recipe, progress) for recipe in ("double-rounding", "gptq"))
    rows = []
    for name in NAMES:
        losses = nested.losses[name], apart.losses[name]
        rows.append(Row((name, *(f"{loss:.5f}" for loss in losses), f"{losses[0] / losses[1]:.1f}", f"{apart.sizes[name]:,}")))
    share = f"{nested.bytes_ / apart.bytes_:.0%}"
    rows.append(Row(("bytes on disk, all sizes", f"{nested.bytes_:,}", f"{apart.bytes_:,}", share, ""), nested.bytes_ < apart.bytes_))
    rows.append(Row(("bits a weight", f"{nested.bits:.2f}", f"{apart.bits:.2f}", "", ""), nested.bits < MOST_BITS))
    for row in rows:
        print("  ".join(cell for cell in row.cells if cell), flush=True)
    remark = (
        "Mean KL to the original on the report split, one size in all blocks of the embedded default, its embedding in eight bits; trained "
        "as the recipe does, against GPTQ's variants of the same formats, which aren't trained. Bytes are those of the folder of variants, "
        f"headers and all. Bits hold below {MOST_BITS:g}: integers of eight and a scale for each 128 are 8.125."
    )
    return Section("One store of integers", ("size", "nested", "each by itself", "nested over that", "bytes of it alone"), rows, (remark,))


def _made(recipe: str, progress: Progress) -> Made:
    with tempfile.TemporaryDirectory() as folder:
        run, store = prepare(target="transformers", recipe=recipe, formats=NAMES, device="cpu", progress=progress), Store(Path(folder))
        run.encode(store)
        run.train(store)
        reference, elastic = Reference.of(run.model, run.segments.report), run.elastic_model(store)
        losses = {name: measure(elastic.set(run.space.uniform(name)), reference).kl_mean for name in NAMES}
        weights = [weight for decision in run.space.decisions for weight in decision.unit.weights]
        inside = [weight.shape for weight in weights if weight.block is not None]
        sizes = {name: sum(map(formats.get(name).bytes_, inside)) for name in NAMES}
        stored = sum(file.stat().st_size for file in (store.folder / VARIANTS).iterdir())
        return Made(stored, sum(weight.num_weights for weight in weights), losses, sizes)
