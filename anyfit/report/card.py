"""The model card beside an exported model: what it is, how good, how to run it, where it comes from."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateNotFound

from anyfit.formats import formats
from anyfit.report import summary
from anyfit.report.page import environment
from anyfit.structure.levels import worded
from anyfit.targets import targets
from anyfit.targets.base import Needs

if TYPE_CHECKING:
    from anyfit.core.config import Config
    from anyfit.family import Family, Point

_LIBRARIES = {"llama.cpp": "gguf", "onnxruntime": "onnx", "transformers": "transformers"}
"""What the hub calls the library that loads a target's models."""
_PIPELINES = {"language": "text-generation", "embedding": "feature-extraction", "classes": "image-classification"}
"""What the hub calls that which models of a task are for."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(family: Family, point: Point, file_name: str, *, dense: bool = False) -> str:
    """The README.md, with the Hugging Face hub's front matter, of the model written to `file_name`.

    Figures are of the report split where this very config was measured; a config that was only predicted
    says so. `dense`: it is an ordinary folder for transformers, whatever the family's target.
    """
    target = "transformers" if dense else family.target
    made = environment().overlay(autoescape=False)
    made.filters["code"] = _code
    context: dict[str, Any] = {
        "family": family,
        "point": point,
        "quality": point.report,
        "expected": family.expected(point.predicted),
        "file_name": file_name,
        "task": family.original.report.task,
        "shares": summary.shares(family.space, point.config),
        "roles": _roles(family, point.config),
        "front_matter": _front_matter(family, target),
        "rounded": sorted({name for name in point.config.formats.values() if formats.get(name).rounds}),
        "needs": Needs() if dense else targets.get(target).needs(point.config),
        "provenance": summary.flat(family.provenance),
    }
    try:
        usage = made.get_template(f"run.{target}.md.j2").render(context)
    except TemplateNotFound:
        usage = ""
    return made.get_template("card.md.j2").render(context, usage=usage)


def _front_matter(family: Family, target: str) -> str:
    """YAML by way of JSON, which is YAML: no name can break out of its string."""
    fields: dict[str, Any] = {"pipeline_tag": _PIPELINES[family.original.report.task]}
    if target in _LIBRARIES:
        fields["library_name"] = _LIBRARIES[target]
    how = ("pruned",) if family.pruned else ("sparse",) if family.masked else ("quantized", "mixed-precision")
    if _HUB_ID.fullmatch(family.original.name):
        fields["base_model"] = family.original.name
        if "quantized" in how:
            fields["base_model_relation"] = "quantized"
    fields["tags"] = ["anyfit", *how]
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())


def _roles(family: Family, config: Config) -> list[tuple[str, str]]:
    """(role, what its matrices got), for instance ("down", "Q6_K x 4, Q4_K x 12")."""
    got: dict[str, Counter[str]] = {}
    for decision in family.space.decisions:
        for weight in decision.unit.weights:
            got.setdefault(weight.role, Counter())[worded(config[decision.key])] += 1
    return [(role, ", ".join(f"{name} × {count}" for name, count in counts.most_common())) for role, counts in got.items()]


def _code(text: object) -> str:
    """Outside text as inline code that stays inside its table cell."""
    return "`" + re.sub(r"\s+", " ", str(text)).replace("`", "'").replace("|", "/") + "`"
