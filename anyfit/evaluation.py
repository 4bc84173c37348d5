"""Measuring a finished model on held-out text, beside its original: `anyfit evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anyfit.calibration import pictures
from anyfit.calibration.data import held_out, is_named
from anyfit.calibration.defaults import LONGEST_SEGMENT, NUM_REPORT, Data, segment_length, usual
from anyfit.calibration.generated import SELF
from anyfit.checkpoint import Checkpoint
from anyfit.core.errors import DataError, UserError
from anyfit.family.family import Family, is_family
from anyfit.interface import LANGUAGE, PICTURES, interface_of
from anyfit.progress import Progress, Silent
from anyfit.tasks import task_of
from anyfit.tasks.base import Quality, Reference
from anyfit.zoo import MODEL


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
            quality = {name: value for name, value in quality.items() if name.startswith(("perplexity", "num_"))}
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
    if origin is None and interface_of(opened.model.config) is not LANGUAGE:
        raise UserError(f"{opened.name} is an encoder, which says nothing by itself.", remedy="Name its original with --against.")
    with progress.stage("evaluate", 1) as stage:
        if origin is None:
            original, quality = None, task_of(opened.model.config).reference(opened.model, text).quality
        else:
            reference = _original(origin, opened, trust_remote_code, text)
            original, quality = reference.quality, reference.measured(opened.model)
        stage.advance()
    results = None
    if tasks:
        from anyfit.tasks.harness import run as run_tasks

        results = run_tasks(opened.model, opened.tokenizer(), list(tasks))
    return Evaluation(opened.name, described, quality, original, results)


@dataclass(frozen=True)
class _Subject:
    """A model to be measured. `folder`: where what belongs to its original lies; `kept`: the text that its family reports on."""

    name: str
    model: PreTrainedModel
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    folder: Path
    embedded: bool
    kept: Tensor | None = None


def _open_subject(subject: str | Path | None, budget: str | Iterable[str] | None, trust_remote_code: bool) -> _Subject:
    path = Path(subject if subject is not None else MODEL)
    if is_family(path):
        family = Family.open(path, trust_remote_code=trust_remote_code)
        if budget is None:
            raise UserError(f"{path} is a family: which of its models?", remedy="Say --budget.")
        point = family.select(budget)
        model = family.extract(point.config)
        name, source = f"{path} at {family.budget(budget)}", family.source
        return _Subject(name, model, source.tokenizer, source.folder, family.original.embedded, family.text()["report"])
    if budget is not None:
        raise UserError(f"{path} is no family, so it has no budget to choose by.", remedy="Leave out --budget, or name a family.")
    if path.suffix == ".gguf":
        from anyfit.targets.llamacpp import read_model

        model, tokenizer = read_model(path)
        return _Subject(str(path), model, lambda: tokenizer, path.parent, embedded=False)
    checkpoint = Checkpoint.open(MODEL if subject is None else subject, trust_remote_code=trust_remote_code)
    return _Subject(checkpoint.name, checkpoint.load(), checkpoint.tokenizer, checkpoint.folder, checkpoint.embedded)


def _held_out(subject: _Subject, data: Data, length: int | None, segments: int | None) -> tuple[Tensor, str]:
    """Tokens to measure on, (segments, length), and what they are."""
    if data is None and subject.kept is not None and length is None:
        return subject.kept[:segments], "the family's report split"
    data = usual(data, embedded=subject.embedded)
    if is_named(data, SELF):
        raise DataError(
            "There is no text to measure on, and what a model writes itself says nothing about it.",
            remedy="Name some with --data: text files, a folder of them, JSONL, or hf:NAME.",
        )
    if not interface_of(subject.model.config).words:
        return pictures.held_out(data, subject.folder, subject.model.config, segments or NUM_REPORT * PICTURES.segments)
    return held_out(
        data,
        subject.tokenizer(),
        length=segment_length(length, subject.model.config, LONGEST_SEGMENT),
        num_segments=segments or NUM_REPORT * interface_of(subject.model.config).segments,
        texts=interface_of(subject.model.config) is not LANGUAGE,
    )


def _original(origin: str | Path, subject: _Subject, trust_remote_code: bool, text: Tensor) -> Reference:
    checkpoint = Checkpoint.open(origin, trust_remote_code=trust_remote_code)
    theirs, own = (getattr(config, "vocab_size", config.num_labels) for config in (checkpoint.config, subject.model.config))
    if theirs != own or checkpoint.config.hidden_size != subject.model.config.hidden_size:
        raise UserError(
            f"{subject.name} has {own} tokens or classes and {origin} has {theirs}.", remedy="Name the model that it was made of."
        )
    return task_of(checkpoint.config).reference(checkpoint.load(), text)
