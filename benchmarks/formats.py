"""Every K type, uniformly: written by llama.cpp's quantiser with an importance matrix, and by anyfit.

Same model, same calibration tokens, same bytes, same evaluation. All matrices of the blocks are quantised; the
embedding and the head stay as they are, so that nothing but the quantisers differs.

    python benchmarks/formats.py [--assets FOLDER]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peer_ggml import quantise
from table import Row, finish
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.calibration.collect import collect
from anyfit.calibration.data import load
from anyfit.checkpoint import Checkpoint
from anyfit.core.units import Weight
from anyfit.formats import formats
from anyfit.progress import Silent
from anyfit.quantizers import quantizers
from anyfit.tasks.language import Quality, Reference, measure
from anyfit.zoo import DATA, MODEL

LOWEST_GAIN = 0.40
"""How much lower anyfit's mean KL must be than llama.cpp's; at Q6_K it must be no worse."""
CLAIMS = {"Q2_K": LOWEST_GAIN, "Q3_K": LOWEST_GAIN, "Q4_K": LOWEST_GAIN, "Q5_K": LOWEST_GAIN, "Q6_K": 0.0}
LENGTH, NUM_CALIBRATION, NUM_REPORT = 256, 128, 96


@dataclass(frozen=True)
class Subject:
    name: str
    folder: Path
    calibration: Tensor
    report: Tensor


def subjects(assets: Path | None) -> Iterator[Subject]:
    checkpoint = Checkpoint.open(MODEL)
    text = load(DATA, checkpoint.tokenizer(), length=LENGTH, num_calibration=NUM_CALIBRATION, num_search=1, num_report=NUM_REPORT, seed=0)
    yield Subject("embedded default", MODEL, text.calibration, text.report)
    folder = assets / "tinystories-llama-3m" if assets else None
    if folder is None or not folder.is_dir():
        print("skipped: tinystories-llama-3m (say ASSETS=FOLDER, a folder that has it)", flush=True)
        return
    train, held_out = np.load(folder / "train.npy"), np.concatenate([np.load(folder / f"{part}.npy") for part in ("valid", "test")])
    starts = np.random.default_rng(1234).integers(0, len(train) - LENGTH, NUM_CALIBRATION)
    calibration = torch.from_numpy(np.stack([train[i : i + LENGTH] for i in starts])).long()
    report = torch.from_numpy(held_out[: NUM_REPORT * LENGTH].reshape(NUM_REPORT, LENGTH)).long()
    yield Subject("tinystories-llama-3m", folder, calibration, report)


def compare(subject: Subject) -> Iterator[Row]:
    model = Checkpoint.open(subject.folder).load()
    architecture = architecture_of(model)
    weights = [weight for weight in architecture.weights(model) if weight.block is not None]
    statistics = collect(model, architecture, weights, subject.calibration, progress=Silent())
    reference = Reference.of(model, subject.report)
    original = {w.name: model.get_parameter(w.name).detach().clone() for w in weights}
    quantizer = quantizers.get("gptq")
    prepared = {name: quantizer.prepare(entry) for name, entry in statistics.items()}

    def measured(variant: Callable[[Weight], Tensor]) -> tuple[Quality, float]:
        began = time.process_time()
        values = {w.name: variant(w) for w in weights}
        seconds = time.process_time() - began
        _fill(model, values)
        quality = measure(model, reference)
        _fill(model, original)
        return quality, seconds

    def peer(type_: str, weight: Weight) -> Tensor:
        return quantise(original[weight.name], type_, statistics[weight.input].diagonal)

    def own(type_: str, weight: Weight) -> Tensor:
        format_ = formats.get(type_)
        return format_.decode(quantizer.encode(original[weight.name], prepared[weight.input], format_).data)

    for type_, gain in CLAIMS.items():
        theirs, their_seconds = measured(partial(peer, type_))
        ours, our_seconds = measured(partial(own, type_))
        yield _row(subject, type_, formats.get(type_).bits, theirs, ours, (their_seconds, our_seconds), gain)


def _row(subject: Subject, type_: str, bits: float, theirs: Quality, ours: Quality, seconds: tuple[float, float], gain: float) -> Row:
    ratio = ours.kl_mean / theirs.kl_mean
    error = ratio * math.hypot(ours.kl_stderr / ours.kl_mean, theirs.kl_stderr / theirs.kl_mean)
    cells = (
        subject.name, type_, f"{bits:.4g}",
        f"{theirs.kl_mean:.5f} ± {theirs.kl_stderr:.5f}", f"{ours.kl_mean:.5f} ± {ours.kl_stderr:.5f}",
        f"{1 - ratio:+.1%} ± {error:.1%}", f"{theirs.perplexity:.3f}", f"{ours.perplexity:.3f}",
        f"{seconds[0]:.1f}", f"{seconds[1]:.1f}",
    )  # fmt: skip
    print("  ".join(cells), flush=True)
    return Row(cells, holds=ratio <= 1 - gain)


@torch.no_grad()
def _fill(model: PreTrainedModel, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, default=None, help="a folder with further models")
    args = parser.parse_args()
    torch.set_num_threads(1)  # both sides are timed in CPU seconds of one thread
    rows = [row for subject in subjects(args.assets) for row in compare(subject)]
    header = (
        "model",
        "type",
        "bits",
        "KL llama.cpp + imatrix",
        "KL anyfit",
        "lower by",
        "ppl llama.cpp",
        "ppl anyfit",
        "CPU s",
        "CPU s anyfit",
    )
    remarks = (
        f"Mean KL to the original in nats per token on {NUM_REPORT} held-out segments of {LENGTH} tokens, ± standard error over segments; "
        f"{NUM_CALIBRATION} calibration segments. A row holds where anyfit's KL is lower by {LOWEST_GAIN:.0%}; at Q6_K, where it is not "
        "higher.",
    )
    return finish(
        "formats", "One type everywhere: anyfit against llama.cpp's quantiser", "make bench-formats ASSETS=FOLDER", header, rows, remarks
    )


if __name__ == "__main__":
    sys.exit(main())
