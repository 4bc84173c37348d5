"""PV-Tuning against straight-through estimation of the same representation, at about two bits."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from table import Row, Section
from transformers import PreTrainedModel

from anyfit.family.store import Store, stored_matrices
from anyfit.pipeline import Fit
from anyfit.progress import Progress
from anyfit.tasks.language import Reference, measure
from anyfit.tuning import pv
from anyfit.tuning.coded import Stored
from anyfit.tuning.refining import windows


@dataclass(frozen=True)
class Subject:
    """All blocks in `format_`. `rates` of the codes: each share is shown at the better one, by the search split."""

    title: str
    target: str
    format_: str
    rest: str
    rates: tuple[float, ...]
    start: str


SUBJECTS = (
    Subject("Codes of two bits", "llama.cpp", "IQ2_XXS", "Q8_0", (0.02, 0.03), "GPTQ"),
    Subject("Codes and codebooks of two bits", "transformers", "aqlm_1x8g4", "BF16", (0.03,), "AQLM"),
)
SETTINGS = pv.Settings(num_steps=150, batch_size=4, half_rate=5e-3)
SHARES = (0.01, 0.03, 1.0)
NO_CODES = 1e-9


def section(subject: Subject, run: Fit, store: Store, progress: Progress) -> Section:
    """`store` has the variants of the subject's format."""
    config = run.space.uniform(subject.format_)
    entries = {e.weight.name: e for e in stored_matrices(store.variant, run.space, config, run.target, run.source)}
    entries = {name: e for name, e in entries.items() if e.format_.name == subject.format_ and e.weight.block is not None}
    matrices = {name: entry.matrix(run.model) for name, entry in entries.items()}
    text, held_out, report = (
        Reference.of(run.model, tokens) for tokens in (windows(run.segments.calibration), run.segments.search, run.segments.report)
    )

    def figures(settings: pv.Settings | None) -> tuple[float, float, float, float]:
        """KL on the search split, perplexity and KL on the report split, seconds."""
        began = time.perf_counter()
        now = entries
        if settings is not None:
            tuned = pv.tune(run.model, matrices, text, held_out, settings=settings, progress=progress)
            now = {name: Stored(e.weight, e.format_, tuned.coded[name].data, e.order) for name, e in entries.items()}
        seconds, network = time.perf_counter() - began, _network(run, now)
        quality = measure(network, report)
        return measure(network, held_out).kl_mean, quality.perplexity, quality.kl_mean, seconds

    rows = [_row(f"{subject.start}, untuned", "", figures(None)), _row("all but codes", "", figures(replace(SETTINGS, share=NO_CODES)))]
    best = {}
    for share in SHARES:
        tried = {rate: figures(replace(SETTINGS, share=share, code_rate=rate)) for rate in subject.rates}
        rate = min(tried, key=lambda rate: tried[rate][0])
        best[share] = tried[rate]
        rows.append(_row("straight-through, all codes" if share == 1 else f"PV, {share:.0%} of the codes", f"{rate:g}", tried[rate]))
    for share in SHARES[:-1]:
        change = best[share][1] / best[1.0][1] - 1
        claim = change < 0 if share == SETTINGS.share else None
        rows.append(Row((f"PV, {share:.0%}, against straight-through", "", "", f"{change:+.2%}", "", ""), holds=claim))
    for row in rows:
        print("  ".join(row.cells), flush=True)
    bits = 8 * sum(e.format_.bytes_(e.weight.shape) for e in entries.values()) / sum(e.weight.num_weights for e in entries.values())
    remark = (
        f"All blocks of the embedded default in {subject.format_}, {bits:.2f} bits a weight; {SETTINGS.num_steps} steps of "
        f"{SETTINGS.batch_size} windows, the same for all, each at the best of the rates {', '.join(map(str, subject.rates))}. The paper "
        "has PV, at 1 %, before straight-through estimation: claimed of the recipe's share."
    )
    header = ("what is tuned", "rate of the codes", "KL, search split", "perplexity", "KL", "seconds")
    return Section(subject.title, header, rows, (remark,))


def _row(name: str, rate: str, found: tuple[float, float, float, float]) -> Row:
    search, perplexity, kl, seconds = found
    return Row((name, rate, f"{search:.4f}", f"{perplexity:.3f}", f"{kl:.4f}", f"{seconds:.0f}"))


@torch.no_grad()
def _network(run: Fit, entries: dict[str, Stored]) -> PreTrainedModel:
    network = run.checkpoint.load()
    for name, entry in entries.items():
        network.get_parameter(name).copy_(entry.values())
    return network
