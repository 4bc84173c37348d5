"""llama.cpp: one GGUF file that holds the network, its tokenizer and its chat template."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.errors import ModelError
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.elastic.extracted import Extracted
from anyfit.formats import formats as registry
from anyfit.targets import gguf_check, gguf_kinds, gguf_layout, gguf_tokenizer
from anyfit.targets.base import Check, Target, Variants
from anyfit.targets.gguf_read import read_model
from anyfit.targets.llamacpp_runtime import logits

__all__ = ["TARGET", "LlamaCpp", "logits", "read_model"]

_SMALL = ("Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0")
_SUBSTITUTES = {"Q6_K": "Q8_0", "Q5_K": "Q5_0", **dict.fromkeys(_SMALL, "IQ4_NL")}
"""What stands in for a type of 256 columns where rows are no multiple of that: the nearest in size of 32 columns."""
_ANY_ROW = "F16"


class LlamaCpp(Target):
    """Every matrix is decided by itself: llama.cpp takes any mixture of types, tensor by tensor."""

    name = "llama.cpp"
    suffix = ".gguf"
    formats = (
        *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K", "Q4_1"),
        *("Q4_0", "Q4_K", "IQ4_NL", "IQ4_XS", "MXFP4", "Q3_K", "IQ3_S", "IQ3_XXS"),
        *("Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0"),
    )
    default_formats = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K")
    slow_formats = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS")

    def supports(self, source: Source) -> str | None:
        kind = gguf_kinds.KINDS.get(source.config.model_type)
        if kind is None:
            known = ", ".join(sorted(gguf_kinds.KINDS))
            return f"networks of the kind {source.config.model_type!r} are not written as GGUF; these are: {known}"
        if problem := gguf_kinds.refuses(source.config, kind):
            return problem
        if name := gguf_layout.misplaced(source):
            return f"llama.cpp has no place for {name} in a network of this kind"
        try:
            gguf_tokenizer.read(source.tokenizer(), source.config)
        except ModelError as error:
            return error.problem
        return None

    def space(self, source: Source, weights: Iterable[Weight], formats: Iterable[str]) -> Space:
        """See `Target.space`. Where both 16-bit types are wanted, the one that is nearer to the original is a choice."""
        wanted = self.named(formats)
        weights = list(weights)
        fixed = gguf_layout.fixed_tensors(source)
        stored = sum(4 * value.numel() for value in fixed.values())
        return Space(
            decisions=tuple(self._decision(source, weight, wanted) for weight in weights),
            fixed_bytes=_header_bytes(source, weights, fixed) + sum(gguf_layout.padded(4 * value.numel()) for value in fixed.values()),
            fixed_stored_bytes=stored,
            num_parameters=sum(w.num_weights for w in weights) + sum(value.numel() for value in source.passthrough.values()),
        )

    def row_order(self, source: Source, weight: Weight) -> Tensor | None:
        return gguf_layout.row_order(source, weight.name)

    def write(self, path: Path, source: Source, space: Space, config: Config, variants: Variants) -> int:
        shapes = {weight.name: weight.shape for decision in space.decisions for weight in decision.unit.weights}
        matrices = gguf_layout.matrices(source, shapes, config)
        fixed = gguf_layout.fixed_tensors(source)
        writer = gguf_layout.write_header(path, source, matrices, fixed)
        try:
            for matrix in matrices:
                writer.write_tensor_data(variants(matrix.source, matrix.format).contiguous().numpy())
            for value in fixed.values():
                writer.write_tensor_data(value.contiguous().numpy())
        finally:
            writer.close()
        return path.stat().st_size

    def check(self, path: Path, source: Source, config: Config, model: Extracted, tokens: Tensor) -> tuple[Check, ...]:
        return gguf_check.checks(path, source, config, model, tokens)

    def _decision(self, source: Source, weight: Weight, wanted: list[str]) -> Decision:
        legal, refused = set(), {}
        for name in wanted:
            if name == _worse_half(source, wanted):
                refused[name] = "the other 16-bit type takes as many bytes and is nearer to the original"
                continue
            reason = registry.get(name).refuses(weight.shape)
            if reason is None:
                legal.add(name)
                continue
            substitute = _SUBSTITUTES.get(name, _ANY_ROW)
            if registry.get(substitute).refuses(weight.shape):
                substitute = _ANY_ROW
            legal.add(substitute)
            refused[name] = f"{reason}; {substitute} takes its place"
        copies = len(list(gguf_layout.places(source, weight.name)))
        sizes = {name: registry.get(name).bytes_(weight.shape) for name in self.formats if name in legal}
        choices = tuple(Choice(name, copies * gguf_layout.padded(size), copies * size) for name, size in sizes.items())
        return Decision(Unit(weight.name, (weight,)), choices, refused=refused)


def _worse_half(source: Source, wanted: list[str]) -> str | None:
    """Of both 16-bit types the one that loses more: what isn't stored as bfloat16 is nearer in F16."""
    if not {"F16", "BF16"} <= set(wanted):
        return None
    return "F16" if source.config.dtype == torch.bfloat16 else "BF16"


def _header_bytes(source: Source, weights: list[Weight], fixed: dict[str, Tensor]) -> int:
    """Bytes before the first tensor, found by writing them. Formats don't matter: each is one number in there."""
    shapes = {weight.name: weight.shape for weight in weights}
    matrices = gguf_layout.matrices(source, shapes, Config.of_formats(dict.fromkeys(shapes, _ANY_ROW)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "header.gguf")
        gguf_layout.write_header(path, source, matrices, fixed).close()
        return gguf_layout.padded(path.stat().st_size)


TARGET = LlamaCpp()
