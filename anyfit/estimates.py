"""What a run would take, told before it: memory, time, and whether it has text enough."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from anyfit.calibration import generated
from anyfit.calibration.data import PURPOSES
from anyfit.calibration.saturation import Saturation, saturate
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.units import Weight
from anyfit.finalists import EVOLUTION, GENERATIONS, NUM_FINALISTS, NUM_REFINED
from anyfit.formats import formats as all_formats
from anyfit.pipeline import NUM_PROBE_SEGMENTS, Fit
from anyfit.quantizers import quantizers
from anyfit.tasks.language import kept_bytes
from anyfit.tuning.refining import WINDOW, Settings

_ROWS = 128
"""Of a matrix, that encoding is timed on."""


def saturation(run: Fit) -> Saturation | None:
    """On one matrix for each input of the middle block, in the format of the fewest bits that it may have."""
    blocks = sorted({weight.block for weight in run.weights if weight.block is not None})
    choices = {weight: decision.choices for decision in run.space.decisions for weight in decision.unit.weights}
    chosen = {weight.input: weight for weight in reversed(run.weights) if weight.block == blocks[len(blocks) // 2] and weight.input}
    lowest = {weight: min(choices[weight], key=lambda choice: choice.bytes_).name for weight in chosen.values()}
    parameters = dict(run.model.named_parameters(remove_duplicate=False))
    quantizer = quantizers.get(run.recipe.quantizer)

    def stored(weight: Weight, matrix: Tensor, statistics: InputStatistics) -> Tensor:
        format_ = all_formats.get(lowest[weight])
        return format_.decode(quantizer.encode(matrix, quantizer.prepare(statistics), format_).data)

    matrices = {weight: parameters[weight.name].float() for weight in chosen.values()}
    matrices = {weight: matrix.T.contiguous() if weight.transposed else matrix for weight, matrix in matrices.items()}
    return saturate(run.model, run.architecture, matrices, run.segments, stored, seed=run.settings.seed, progress=run.progress)


def memory(run: Fit) -> int:
    """Peak bytes beyond the interpreter's own: the larger of calibrating and measuring."""
    model = 4 * run.space.num_parameters
    widths = {w.input: w.shape[1] for w in run.weights if w.input is not None}
    moments = sum(8 * width**2 for width in widths.values())
    solving = max(24 * w.shape[1] ** 2 + 16 * w.num_weights for w in run.weights)
    vocabulary = run.checkpoint.config.vocab_size
    references = sum(kept_bytes(run.segments.num_tokens(name), vocabulary) for name in ("search", "report"))
    writing = generated.memory(run.checkpoint.config, run.settings.length) if run.segments.num_pending else 0
    # Beside the networks, tuning holds levels, latents, values, gradients and what they are made of.
    tuning = 6 * model if run.effort.refines else 0
    return max(model + writing, model + moments + solving, 2 * model + tuning + references)


@torch.inference_mode()
def seconds(run: Fit) -> float:
    """From some rows in each format and two segments' length of text, scaled to all of them."""
    text = torch.zeros(2, run.settings.length, dtype=torch.int64)
    began = time.perf_counter()
    run.model(input_ids=text, use_cache=False)
    per_token = (time.perf_counter() - began) / text.numel()
    sizes = {name: run.segments.num_tokens(name) for name in PURPOSES}
    probing = NUM_PROBE_SEGMENTS * run.settings.length * len(run.space.decisions)
    measuring = (sizes["search"] + sizes["report"]) * (NUM_FINALISTS + 2 * len(run.space.formats()))
    encoding = _encoding(run)
    writing = generated.READINGS * run.segments.num_pending
    reading = writing + sizes["calibration"] + probing + measuring + (_more_effort(run, sizes) if run.effort.refines else 0)
    return per_token * reading + encoding


def _encoding(run: Fit) -> float:
    """Seconds to encode everything, from some rows of the largest matrix in each format."""
    weight = max((w for w in run.weights if w.block is not None), key=lambda w: w.num_weights)
    rows = torch.randn(_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    quantizer = quantizers.get(run.recipe.quantizer)
    prepared = quantizer.prepare(InputStatistics.unknown(weight.shape[1]))
    num_weights = Counter[str]()
    for decision in run.space.decisions:
        for choice in decision.choices:
            num_weights[choice.name] += decision.unit.num_weights
    total = 0.0
    for choice in next(d for d in run.space.decisions if weight in d.unit.weights).choices:
        quantizer.encode(rows[:1], prepared, all_formats.get(choice.name))  # what is compiled, or read from disk, is so only once
        began = time.perf_counter()
        quantizer.encode(rows, prepared, all_formats.get(choice.name))
        total += (time.perf_counter() - began) / rows.numel() * num_weights[choice.name]
    return total


def _more_effort(run: Fit, sizes: Mapping[str, int]) -> int:
    """Tokens that evolution and refining read, as forward passes."""
    settings = Settings()
    evolving = GENERATIONS * sum(segments * entrants for segments, entrants in EVOLUTION) * run.settings.length
    # Both networks run through a block to each of its inputs, three passes in all; a step of tuning costs three.
    solving = 6 * min(settings.num_segments, len(run.segments.calibration)) * run.settings.length
    tuning = 3 * settings.tuning.num_segments * min(WINDOW, run.settings.length)
    return NUM_REFINED * (evolving + solving + tuning + 2 * (sizes["search"] + sizes["report"]))
