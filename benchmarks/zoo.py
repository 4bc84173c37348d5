"""Whether the embedded default is trained well enough to measure with: what plain rounding costs it.

Every matrix of the blocks is rounded in groups of 32 between each group's smallest and largest weight, scales in
float32, no calibration. The report modules of the running interpreter's standard library, which it was not trained on.
"""

from __future__ import annotations

import argparse
import sys

import torch
from table import Row, finish
from torch import Tensor

from anyfit.architectures import architecture_of
from anyfit.calibration.data import held_out
from anyfit.checkpoint import Checkpoint
from anyfit.tasks.language import Quality, Reference, measure
from anyfit.zoo import DATA, MODEL

LOWEST_RISE = 0.5
"""Of the perplexity, at two bits."""
GROUP, NUM_SEGMENTS = 32, 160


def rounded(weight: Tensor, bits: int) -> Tensor:
    groups = weight.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    checkpoint = Checkpoint.open(MODEL)
    model = checkpoint.load()
    length = checkpoint.config.max_position_embeddings
    tokens, description = held_out(DATA, checkpoint.tokenizer(), length=length, num_segments=NUM_SEGMENTS)
    reference = Reference.of(model, tokens)
    original = {w.name: model.get_parameter(w.name).detach().clone() for w in architecture_of(model).weights(model) if w.block is not None}
    rows = [_row("original", reference.quality, reference.quality)]
    for bits in (4, 3, 2):
        with torch.no_grad():
            for name, weight in original.items():
                model.get_parameter(name).copy_(rounded(weight, bits))
        rows.append(_row(f"{bits} bits", measure(model, reference), reference.quality, LOWEST_RISE if bits == 2 else None))
    remarks = (
        f"{len(tokens)} segments of {length} tokens of {description}. ± standard error over segments. The last row holds where the "
        f"perplexity rises by at least {LOWEST_RISE:.0%}: a network that rounding doesn't hurt can't tell quantisers apart.",
    )
    return finish("zoo", "The embedded default", "make bench-zoo", ("weights of the blocks", "perplexity", "rise", "KL"), rows, remarks)


def _row(name: str, quality: Quality, original: Quality, least: float | None = None) -> Row:
    rise = quality.perplexity / original.perplexity - 1
    cells = (
        name,
        f"{quality.perplexity:.3f} ± {quality.perplexity_stderr:.3f}",
        f"{rise:+.1%}",
        f"{quality.kl_mean:.4f} ± {quality.kl_stderr:.4f}",
    )
    return Row(cells, holds=None if least is None else rise >= least)


if __name__ == "__main__":
    sys.exit(main())
