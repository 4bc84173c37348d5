"""What anyfit does, as functions: the command line has the same verbs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from anyfit.calibration.data import Segments, load
from anyfit.checkpoint import Checkpoint
from anyfit.core.budget import Budget
from anyfit.core.errors import DataError, UserError
from anyfit.core.files import refuse_existing
from anyfit.core.space import coverage
from anyfit.core.units import Weight
from anyfit.family.family import Family
from anyfit.formats import formats as all_formats
from anyfit.pipeline import Fit, Settings
from anyfit.progress import Progress, Silent
from anyfit.quantizers import quantizers
from anyfit.recipes import recipes
from anyfit.searchers.exact import require
from anyfit.targets import targets
from anyfit.tasks.language import Quality, Reference, measure
from anyfit.zoo import DATA, MODEL

NUM_CALIBRATION, NUM_SEARCH, NUM_REPORT = 128, 32, 64
LONGEST_SEGMENT = 2048

Data = str | Path | Sequence[str | Path] | None


def fit(
    model: str | Path | None = None,
    *,
    data: Data = None,
    target: str = "llama.cpp",
    formats: Iterable[str] | None = None,
    recipe: str = "gptq",
    output: str | Path | None = None,
    length: int | None = None,
    segments: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Family:
    """Turn a network into a family.

    `model`: a folder in Hugging Face form or a hub id; None takes the embedded default. `data`: text files, a
    folder of them, or JSONL; what calibrates is never what measures. `length`: tokens a segment (default: the
    model's context, at most 2048); `segments`: how many calibrate (default 128). A run that was killed is
    continued by the same call; `restart` begins again. Raises `UserError`s, before any long work.
    """
    progress = progress or Silent()
    name = Path(model).name if model is not None else "default"
    output = Path(output) if output is not None else Path(f"{name}.family")
    refuse_existing(output, force=force)
    run = _prepare(model, data, target, formats, recipe, length, segments, seed, trust_remote_code, progress)
    run.checkpoint.check_finite(progress)
    run.run(output, restart=restart)
    return Family.open(output)


@dataclass(frozen=True)
class Plan:
    """What a fit would take and what could come of it."""

    model: str
    target: str
    recipe: str
    formats: tuple[str, ...]
    num_parameters: int
    original_bytes: int
    smallest_bytes: int
    largest_bytes: int
    memory_bytes: int
    disk_bytes: int
    seconds: float
    coverage: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    model: str | Path | None = None,
    *,
    data: Data = None,
    target: str = "llama.cpp",
    formats: Iterable[str] | None = None,
    recipe: str = "gptq",
    budget: str | Iterable[str] | None = None,
    length: int | None = None,
    segments: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """What `fit` would need and offer, from trying its largest matrix and one batch of text.

    Raises what `fit` would raise, and `BudgetError` for a `budget` that no config of the family could meet.
    """
    progress = progress or Silent()
    run = _prepare(model, data, target, formats, recipe, length, segments, 0, trust_remote_code, progress)
    run.checkpoint.check_finite(progress)
    space = run.space
    smallest, largest = space.smallest(), space.largest()
    if budget is not None:
        require(space, Budget.parse(budget, original_bytes=run.checkpoint.bytes_))
    return Plan(
        model=run.checkpoint.name,
        target=target,
        recipe=recipe,
        formats=tuple(space.formats()),
        num_parameters=space.num_parameters,
        original_bytes=run.checkpoint.bytes_,
        smallest_bytes=space.bytes_(smallest),
        largest_bytes=space.bytes_(largest),
        memory_bytes=_memory(run),
        disk_bytes=sum(c.stored_bytes for d in space.decisions for c in d.choices) + space.fixed_bytes,
        seconds=_seconds(run, progress),
        coverage=tuple(coverage(space)),
        notes=run.segments.notes,
    )


@dataclass(frozen=True)
class Evaluation:
    """Quality of one model on held-out text, beside the original's where that is at hand."""

    subject: str
    text: str
    quality: Quality
    original: Quality | None
    tasks: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "text": self.text,
            "quality": self.quality.to_json(),
            "original": self.original and self.original.to_json(),
            "tasks": self.tasks,
        }


def evaluate(
    subject: str | Path,
    *,
    budget: str | Iterable[str] | None = None,
    data: Data = None,
    against: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    length: int | None = None,
    segments: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model: a family at a `budget`, a model folder or hub id, or a GGUF file.

    `data`: text to measure on (default: what a family kept for its report; for the embedded default, the
    standard library's report modules). `against`: the original, which divergence and agreement are taken to;
    without it, only perplexity is known. `tasks`: names of lm-eval tasks.
    """
    progress = progress or Silent()
    model, tokenizer, kept, embedded = _subject(Path(subject), subject, budget, trust_remote_code)
    text, described = _held_out(kept, embedded, data, tokenizer, model.config, length, segments)
    original = None
    if against is not None or embedded:
        origin = Checkpoint.open(against if against is not None else MODEL, trust_remote_code=trust_remote_code)
        if origin.config.vocab_size != model.config.vocab_size:
            raise UserError(f"{against} has another vocabulary than {subject}.", remedy="Name the model that it was made of.")
        original = Reference.of(origin.load(), text)
    with progress.stage("evaluate", 1) as stage:
        own = Reference.of(model, text).quality
        quality = measure(model, original) if original is not None else own
        stage.advance()
    results = None
    if tasks:
        from anyfit.tasks.harness import run as run_tasks

        results = run_tasks(model, tokenizer, list(tasks))
    return Evaluation(str(subject), described, quality, original.quality if original is not None else None, results)


def _prepare(
    model: str | Path | None,
    data: Data,
    target: str,
    formats: Iterable[str] | None,
    recipe: str,
    length: int | None,
    segments: int | None,
    seed: int,
    trust_remote_code: bool,
    progress: Progress,
) -> Fit:
    """Everything that can be checked before long work."""
    runtime = targets.get(target)
    quantizers.get(recipes.get(recipe).quantizer)
    wanted = tuple(dict.fromkeys(formats)) if formats is not None else runtime.default_formats
    for name in wanted:
        all_formats.get(name)
        if name not in runtime.formats:
            raise UserError(f"{target} doesn't load the format {name}.", remedy=f"It loads: {', '.join(runtime.formats)}.")
    checkpoint = Checkpoint.open(model if model is not None else MODEL, trust_remote_code=trust_remote_code)
    if data is None:
        if model is not None:
            raise DataError("There is no text to calibrate with.", remedy="Name some with --data: text files, a folder of them, or JSONL.")
        data = DATA
    length = length or min(LONGEST_SEGMENT, _context(checkpoint))
    settings = Settings(target, wanted, recipe, length, segments or NUM_CALIBRATION, NUM_SEARCH, NUM_REPORT, seed)
    text = load(
        data,
        checkpoint.tokenizer(),
        length=length,
        num_calibration=settings.num_calibration,
        num_search=settings.num_search,
        num_report=settings.num_report,
        seed=seed,
    )
    run = Fit(checkpoint, text, settings, progress)
    reason = runtime.supports(run.source)
    if reason:
        raise UserError(f"{target} can't run {checkpoint.name}: {reason}.", remedy="Take another target: anyfit targets lists them.")
    assert run.space.decisions
    return run


def _context(checkpoint: Checkpoint) -> int:
    return int(getattr(checkpoint.config, "max_position_embeddings", LONGEST_SEGMENT))
