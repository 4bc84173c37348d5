"""What anyfit does, as functions: the command line has the same verbs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from anyfit.calibration.data import held_out, load
from anyfit.calibration.statistics import InputStatistics
from anyfit.checkpoint import Checkpoint
from anyfit.core.budget import Budget
from anyfit.core.errors import DataError, ModelError, UserError
from anyfit.core.files import refuse_existing
from anyfit.family.family import Family, is_family
from anyfit.formats import formats as all_formats
from anyfit.pipeline import NUM_FINALISTS, NUM_PROBE_SEGMENTS, Fit, Settings
from anyfit.progress import Progress, Silent
from anyfit.quantizers import quantizers
from anyfit.recipes import recipes
from anyfit.searchers.exact import require
from anyfit.targets import targets
from anyfit.tasks.language import Quality, Reference, kept_bytes, measure
from anyfit.zoo import DATA, MODEL

NUM_CALIBRATION, NUM_SEARCH, NUM_REPORT = 128, 16, 32
LONGEST_SEGMENT = 2048

Data = str | Path | Sequence[str | Path] | None


class Wishes(TypedDict, total=False):
    """What decides a family; the same for `fit` and `plan`. See `prepare`."""

    data: Data
    target: str
    formats: Iterable[str] | None
    recipe: str
    length: int | None
    segments: int | None
    seed: int
    trust_remote_code: bool


def fit(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    **wishes: Unpack[Wishes],
) -> Family:
    """Turn a network into a family, the folder `output`; `wishes` are those of `prepare`.

    A run that was killed is continued by the same call; `restart` throws away what it had done. An existing
    `output` is only replaced with `force`. Raises `UserError`s, before any long work.
    """
    progress = progress or Silent()
    name = "default" if model is None else Path(model).name
    output = Path(output) if output is not None else Path(f"{name}.family")
    refuse_existing(output, force=force, ours=is_family, inputs=_inputs(model, wishes.get("data")))
    run = prepare(model, progress=progress, **wishes)
    run.checkpoint.check_finite(progress)
    for note in run.notes():
        progress.note(note)
    run.run(output, restart=restart, force=force)
    return Family.open(output)


def prepare(
    model: str | Path | None = None,
    *,
    data: Data = None,
    target: str = "llama.cpp",
    formats: Iterable[str] | None = None,
    recipe: str = "gptq",
    length: int | None = None,
    segments: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Fit:
    """A run that is ready to go: everything that can be wrong with what was asked has been looked at.

    `model`: a folder in Hugging Face form or a hub id; None takes the embedded default. `data`: text files, a
    folder of them, or JSONL; it is divided into text to calibrate with, to search with and to report on.
    `formats`: those to choose from (default: the target's menu). `length`: tokens a segment (default: the
    model's context, at most 2048). `segments`: how many calibrate (default 128).
    """
    runtime = targets.get(target)
    wanted = runtime.default_formats if formats is None else tuple(dict.fromkeys(formats))
    if not wanted:
        raise UserError("No format was named.", remedy=f"{target} loads: {', '.join(runtime.formats)}.")
    for name in wanted:
        all_formats.get(name)
        if name not in runtime.formats:
            raise UserError(f"{target} doesn't load the format {name}.", remedy=f"It loads: {', '.join(runtime.formats)}.")
    quantizers.get(recipes.get(recipe).quantizer)
    checkpoint = Checkpoint.open(MODEL if model is None else model, trust_remote_code=trust_remote_code)
    length = _segment_length(length, checkpoint.config)
    settings = Settings(target, wanted, recipe, length, segments or NUM_CALIBRATION, NUM_SEARCH, NUM_REPORT, seed)
    text = load(
        _data(data, embedded=model is None),
        checkpoint.tokenizer(),
        length=length,
        num_calibration=settings.num_calibration,
        num_search=settings.num_search,
        num_report=settings.num_report,
        seed=seed,
    )
    run = Fit(checkpoint, text, settings, progress or Silent())
    reason = runtime.supports(run.source)
    if reason:
        raise UserError(f"{target} can't run {checkpoint.name}: {reason}.", remedy="Take another target: anyfit targets lists them.")
    if not any(weight.block is not None for weight in run.weights):
        raise ModelError(f"{checkpoint.name} has no blocks.", remedy="Check num_hidden_layers in its config.json.")
    return run


@dataclass(frozen=True)
class Plan:
    """What a fit would take and what could come of it. Bytes, seconds; `coverage` as a family's."""

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
    budget: str | Iterable[str] | None = None,
    progress: Progress | None = None,
    **wishes: Unpack[Wishes],
) -> Plan:
    """What `fit` with these wishes would need and offer, from trying its largest matrix and a little text.

    Raises what `fit` would raise, and `BudgetError` for a `budget` that no config of the family could meet.
    """
    progress = progress or Silent()
    if budget is not None:
        Budget.parse(budget, original_bytes=1)
    run = prepare(model, progress=progress, **wishes)
    space = run.space
    if budget is not None:
        require(space, Budget.parse(budget, original_bytes=run.checkpoint.bytes_))
    run.checkpoint.check_finite(progress)
    return Plan(
        model=run.checkpoint.name,
        target=run.settings.target,
        recipe=run.settings.recipe,
        formats=tuple(space.formats()),
        num_parameters=space.num_parameters,
        original_bytes=run.checkpoint.bytes_,
        smallest_bytes=space.bytes_(space.smallest()),
        largest_bytes=space.bytes_(space.largest()),
        memory_bytes=_memory(run),
        disk_bytes=sum(c.stored_bytes for d in space.decisions for c in d.choices) + space.fixed_bytes,
        seconds=_seconds(run),
        coverage=run.coverage(),
        notes=run.notes(),
    )


@dataclass(frozen=True)
class Evaluation:
    """Quality of one model on held-out text, beside the original's where that is at hand.

    `divergence`: whether `quality`'s divergence and agreement are to the original; otherwise only its
    perplexity says something.
    """

    subject: str
    text: str
    quality: Quality
    original: Quality | None
    tasks: dict[str, Any] | None

    @property
    def divergence(self) -> bool:
        return self.original is not None

    def to_json(self) -> dict[str, Any]:
        quality = self.quality.to_json()
        if not self.divergence:
            quality = {name: quality[name] for name in ("perplexity", "perplexity_stderr", "num_tokens", "num_segments")}
        return {
            "subject": self.subject,
            "text": self.text,
            "quality": quality,
            "original": self.original and self.original.to_json(),
            "tasks": self.tasks,
        }


def evaluate(
    subject: str | Path | None = None,
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

    `data`: text to measure on. Without it, a family is measured on the text that it kept for its own report, and
    the embedded default on the report modules of the standard library.
    `against`: the original, which divergence and agreement are taken to. `tasks`: names of lm-eval tasks.
    """
    progress = progress or Silent()
    opened = _open_subject(subject, budget, trust_remote_code)
    text, described = _held_out(opened, data, length, segments)
    origin = MODEL if against is None and opened.embedded else against
    with progress.stage("evaluate", 1) as stage:
        if origin is None:
            original, quality = None, Reference.of(opened.model, text).quality
        else:
            reference = _original(origin, opened, trust_remote_code, text)
            original, quality = reference.quality, measure(opened.model, reference)
        stage.advance()
    results = None
    if tasks:
        from anyfit.tasks.harness import run as run_tasks

        results = run_tasks(opened.model, opened.tokenizer, list(tasks))
    return Evaluation(opened.name, described, quality, original, results)


@dataclass(frozen=True)
class _Subject:
    """A model to be measured. `kept`: the text that its family reports on."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    embedded: bool
    kept: Tensor | None = None


def _open_subject(subject: str | Path | None, budget: str | Iterable[str] | None, trust_remote_code: bool) -> _Subject:
    path = Path(subject if subject is not None else MODEL)
    if is_family(path):
        family = Family.open(path)
        if budget is None:
            raise UserError(f"{path} is a family: which of its models?", remedy="Say --budget.")
        point = family.select(budget)
        model = family.extract(point.config)
        return _Subject(
            f"{path} at {family.budget(budget)}", model, family.source.tokenizer(), family.original.embedded, family.text()["report"]
        )
    if budget is not None:
        raise UserError(f"{path} is no family, so it has no budget to choose by.", remedy="Leave out --budget, or name a family.")
    if path.suffix == ".gguf":
        from anyfit.targets.llamacpp import read_model

        model, tokenizer = read_model(path)
        return _Subject(str(path), model, tokenizer, embedded=False)
    checkpoint = Checkpoint.open(MODEL if subject is None else subject, trust_remote_code=trust_remote_code)
    return _Subject(checkpoint.name, checkpoint.load(), checkpoint.tokenizer(), checkpoint.embedded)


def _held_out(subject: _Subject, data: Data, length: int | None, segments: int | None) -> tuple[Tensor, str]:
    """Tokens to measure on, (segments, length), and what they are."""
    if data is None and subject.kept is not None and length is None:
        return subject.kept[:segments], "the family's report split"
    return held_out(
        _data(data, embedded=subject.embedded),
        subject.tokenizer,
        length=_segment_length(length, subject.model.config),
        num_segments=segments or NUM_REPORT,
    )


def _original(origin: str | Path, subject: _Subject, trust_remote_code: bool, text: Tensor) -> Reference:
    checkpoint = Checkpoint.open(origin, trust_remote_code=trust_remote_code)
    theirs, own = checkpoint.config.vocab_size, subject.model.config.vocab_size
    if theirs != own:
        raise UserError(f"{subject.name} has {own} tokens and {origin} has {theirs}.", remedy="Name the model that it was made of.")
    return Reference.of(checkpoint.load(), text)


def _inputs(model: str | Path | None, data: Data) -> list[Path]:
    """What must not be written over: the model and the text."""
    texts = [] if data is None else [data] if isinstance(data, (str, Path)) else list(data)
    return [Path(given).expanduser() for given in (*([] if model is None else [model]), *texts)]


def _data(data: Data, *, embedded: bool) -> str | Path | Sequence[str | Path]:
    if data is not None:
        return data
    if embedded:
        return DATA
    raise DataError("There is no text to work with.", remedy="Name some with --data: text files, a folder of them, or JSONL.")


def _segment_length(length: int | None, config: PretrainedConfig) -> int:
    context = int(getattr(config, "max_position_embeddings", LONGEST_SEGMENT))
    if length is None:
        return min(LONGEST_SEGMENT, context)
    if not 2 <= length <= context:
        raise UserError(
            f"Segments of {length} tokens don't work with a context of {context}.", remedy=f"Give a length from 2 to {context}."
        )
    return length


def _memory(run: Fit) -> int:
    """Peak bytes beyond the interpreter's own: the larger of calibrating and measuring."""
    model = 4 * run.space.num_parameters
    widths = {w.input: w.shape[1] for w in run.weights if w.input is not None}
    moments = sum(8 * width**2 for width in widths.values())
    solving = max(24 * w.shape[1] ** 2 + 16 * w.num_weights for w in run.weights)
    vocabulary = run.checkpoint.config.vocab_size
    references = sum(kept_bytes(getattr(run.segments, name).numel(), vocabulary) for name in ("search", "report"))
    return max(model + moments + solving, 2 * model + references)


@torch.inference_mode()
def _seconds(run: Fit) -> float:
    """From one matrix in one format and two segments of text, scaled to all of them."""
    text = run.segments.calibration[:2]
    began = time.perf_counter()
    run.model(input_ids=text, use_cache=False)
    per_token = (time.perf_counter() - began) / text.numel()
    sizes = {name: getattr(run.segments, name).numel() for name in ("calibration", "search", "report")}
    probing = NUM_PROBE_SEGMENTS * run.settings.length * len(run.space.decisions)
    measuring = (sizes["search"] + sizes["report"]) * (NUM_FINALISTS + 2 * len(run.space.formats()))
    weight = max((w for w in run.weights if w.block is not None), key=lambda w: w.num_weights)
    format_ = all_formats.get(next(d for d in run.space.decisions if weight in d.unit.weights).choices[-1].name)
    quantizer = quantizers.get(run.recipe.quantizer)
    began = time.perf_counter()
    prepared = quantizer.prepare(InputStatistics.unknown(weight.shape[1]))
    quantizer.encode(torch.zeros(weight.shape), prepared, format_)
    per_weight = (time.perf_counter() - began) / weight.num_weights
    encoding = sum(len(d.choices) * d.unit.num_weights for d in run.space.decisions)
    return per_token * (sizes["calibration"] + probing + measuring) + per_weight * encoding
