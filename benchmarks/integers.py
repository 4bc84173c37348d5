"""Plain integer groups against AutoRound's: one format for all linears of the blocks, refined."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from peers import environments
from peers.results import Keep, Outcome, Refused, Result, evaluate, kept, kl_cell, our_code, perplexity_rise
from peers.subjects import Subject
from table import Row, Section

from anyfit.architectures import architecture_of
from anyfit.calibration.collect import collect
from anyfit.formats import formats
from anyfit.progress import Silent
from anyfit.quantizers import quantizers
from anyfit.tasks.language import Reference
from anyfit.tuning import signround
from anyfit.tuning.coded import Stored
from anyfit.tuning.refining import Refinery, Settings

REFINING = Settings(num_segments=128, tuning=signround.Settings(num_segments=800, lean=0.98))
"""As long as AutoRound takes for this network."""


def integer_model(subject: Subject, bits: int, group: int) -> Result:
    """All linears of the blocks in one integer format, refined; the rest as it is."""
    format_, quantizer = formats.get(f"int{bits}_sym_g{group}"), quantizers.get("gptq")
    began = time.process_time()
    original, model = subject.checkpoint.load(), subject.checkpoint.load()
    architecture = architecture_of(model)
    inputs = collect(original, architecture, subject.block_weights, subject.segments.calibration, progress=Silent())
    prepared = {name: quantizer.prepare(entry) for name, entry in inputs.items()}
    stored = []
    for weight in subject.block_weights:
        data = quantizer.encode(original.get_parameter(weight.name).detach(), prepared[weight.input], format_).data
        stored.append(Stored(weight, format_, data, None))
    with torch.no_grad():
        for entry in stored:
            model.get_parameter(entry.weight.name).copy_(entry.values())
    held_out = Reference.of(original, subject.segments.search)
    text = subject.segments.calibration
    Refinery(original, architecture, quantizer, calibration=text, held_out=held_out, settings=REFINING).refine(model, stored, Silent())
    seconds = time.process_time() - began
    quality, losses = evaluate(model, subject.reference)
    size = sum(format_.bytes_(weight.shape) for weight in subject.block_weights)
    rest = subject.num_parameters - sum(weight.num_weights for weight in subject.block_weights)
    size += environments.KEPT_BYTES * rest
    return Result("anyfit", format_.name, size, 8 * size / subject.num_parameters, quality, losses, seconds)


def integer_section(subject: Subject, theirs: Iterable[Outcome], *, keep: Keep) -> Section:
    """Plain integer groups against AutoRound's at the same bits: perplexity and CPU seconds."""
    rows = []
    for (bits, group), outcome in zip(environments.LAYOUTS, theirs, strict=True):
        if isinstance(outcome, Refused):
            rows.append(Row((f"w{bits} g{group}", "", "", "", "", "", f"made none: {outcome.reason}")))
            continue
        key = {"model": subject.checkpoint.digest, "text": subject.segments.digest, "code": our_code(), "settings": repr(REFINING)}
        path = subject.work / "anyfit" / f"integers-{bits}-{group}.json"
        again = Keep.FRESH if keep is Keep.FRESH else Keep.REUSE
        ours = kept(path, key, lambda b=bits, g=group: integer_model(subject, b, g), keep=again)
        assert isinstance(ours, Result)
        rise, error = perplexity_rise(outcome.losses, ours.losses)
        cells = (
            f"w{bits} g{group}", f"{bits + (16 + bits) / group:.2f} / {formats.get(ours.setting).bits:.2f}",
            f"{outcome.quality.perplexity:.3f}", f"{ours.quality.perplexity:.3f} ({rise:+.2%} ± {error:.2%})",
            f"{outcome.seconds:.0f}", f"{ours.seconds:.0f}", kl_cell(outcome) + " / " + kl_cell(ours),
        )  # fmt: skip
        print("  ".join(cells), flush=True)
        rows.append(Row(cells, holds=rise < 0 and ours.seconds <= outcome.seconds and ours.bytes_ <= outcome.bytes_))
    header = (
        "layout",
        "bits of the linears, AutoRound / anyfit",
        "ppl AutoRound",
        "ppl anyfit",
        "CPU s AutoRound",
        "CPU s anyfit",
        "KL AutoRound / anyfit",
    )
    remarks = (
        "One integer format for all linears of the blocks; anyfit's has no zero points. A row holds with a lower perplexity in no more "
        "bytes and no more CPU time.",
    )
    return Section(f"Integer groups: {subject.name}", header, rows, remarks)
