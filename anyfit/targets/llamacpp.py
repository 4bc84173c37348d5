"""llama.cpp: one GGUF file that holds the network, its tokenizer and its chat template."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from anyfit import network
from anyfit.architectures import architecture_of
from anyfit.checkpoint import Source
from anyfit.core.config import WIDTH, Config
from anyfit.core.errors import ModelError, UserError
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.costs.stopwatch import Stopwatch
from anyfit.elastic.extracted import Extracted, InMemory
from anyfit.formats import formats as registry
from anyfit.modeling_cut import Sizes, describe
from anyfit.structure.cutting import sizes
from anyfit.structure.levels import Structure
from anyfit.structure.space import Storage
from anyfit.targets import gguf_check, gguf_cut, gguf_kinds, gguf_layout, gguf_metadata, gguf_tokenizer
from anyfit.targets.base import Check, Cut, CutTarget, Variants
from anyfit.targets.gguf_cut import CHANNELS, Spelled, spelled, zeros
from anyfit.targets.gguf_read import read_model
from anyfit.targets.llamacpp_runtime import logits
from anyfit.targets.llamacpp_stopwatch import LlamaCppStopwatch

__all__ = ["TARGET", "LlamaCpp", "logits", "read_model"]

_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class LlamaCpp(CutTarget):
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
        return gguf_layout.row_order(source, weight.name, weight.shape[0])

    def write(self, path: Path, source: Source, space: Space, config: Config, variants: Variants) -> int:
        shapes = {weight.name: weight.shape for decision in space.decisions for weight in decision.unit.weights}
        return _write(path, source, shapes, config, variants)

    def check(self, path: Path, source: Source, config: Config, model: Extracted, tokens: Tensor) -> tuple[Check, ...]:
        return gguf_check.checks(path, source, config, model, tokens)

    def dense(self, source: Source) -> str:
        """The type of all of the original's tensors, so that none is rounded; float32 where they have several."""
        own = _DENSE.get(source.config.dtype, "F32")
        stored = {tensor.dtype for tensor in source.passthrough.values()}
        return own if stored <= {source.config.dtype} else "F32"

    def storage(self, source: Source, formats: Sequence[str]) -> Storage:
        """Every format beside the dense one. Bytes are the most that there can be: sizes that all blocks have are told once, and
        a block of nothing isn't there."""
        if reason := gguf_cut.refuses(source.config):
            raise UserError(
                f"llama.cpp can't run a smaller network of this one: {reason}.", remedy="Take --target onnxruntime, or transformers."
            )
        dense, model = self.dense(source), source.skeleton()
        weights = {weight.name: weight for weight in architecture_of(model).weights(model)}

        def bytes_(name: str, shape: torch.Size, format_: str) -> tuple[int, int]:
            size = registry.get(format_).bytes_(_matrix(shape)) if name in weights else 4 * shape.numel()
            return gguf_layout.padded(size), size

        def refuses(name: str, shape: torch.Size, format_: str) -> str | None:
            return registry.get(format_).refuses(_matrix(shape))

        (whole, *_) = sizes(model, architecture_of(model))
        group, channels = _of_zeros(whole, source.config.hidden_size)

        def instead(structure: Structure) -> int:
            # What is the first block of the file has an attention, if of zeros, and that has one anyway where the network's first does.
            return channels if structure.axis == WIDTH else (0 if structure.reader.block else group)

        return Storage(dense, bytes_, refuses, _cut_header_bytes(source, weights), instead)

    def write_cut(self, path: Path, source: Source, cut: Cut) -> int:
        made, own, config = self._spelled(source, cut)

        def variants(name: str, format_: str, which: Tensor | slice = slice(None)) -> Tensor:
            return made.variants(cut, own, name, format_, which)

        with network.quiet():
            return _write(path, own, {name: weight.shape for name, weight in made.weights.items()}, config, variants)

    def check_cut(self, path: Path, source: Source, cut: Cut, tokens: Tensor) -> tuple[Check, ...]:
        made, own, config = self._spelled(source, cut)
        with network.quiet():
            return gguf_check.checks(path, own, config, InMemory(made.model, runs=cut.model), tokens)

    def stopwatch(self) -> Stopwatch:
        return LlamaCppStopwatch(self.formats)

    def _spelled(self, source: Source, cut: Cut) -> tuple[Spelled, Source, Config]:
        with network.quiet():
            made = spelled(cut.model, source.frame())
        return made, made.source(source), made.formats(cut.formats, self.dense(source))

    def _decision(self, source: Source, weight: Weight, wanted: list[str]) -> Decision:
        legal, refused = set(), {}
        for name in wanted:
            if name == _worse_half(source, wanted):
                refused[name] = "the other 16-bit type takes as many bytes and is nearer to the original"
                continue
            substitute = gguf_layout.legal(name, weight.shape)
            legal.add(substitute)
            if reason := registry.get(name).refuses(weight.shape):
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


def _write(path: Path, source: Source, shapes: Mapping[str, tuple[int, int]], config: Config, variants: Variants) -> int:
    """The file of matrices of these shapes; its bytes."""
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


def _header_bytes(source: Source, weights: Iterable[Weight], fixed: Mapping[str, Tensor]) -> int:
    """Bytes before the first tensor, found by writing them. Formats don't matter: each is one number in there."""
    shapes = {weight.name: weight.shape for weight in weights}
    matrices = gguf_layout.matrices(source, shapes, Config.of_formats(dict.fromkeys(shapes, gguf_layout.ANY_ROW)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "header.gguf")
        gguf_layout.write_header(path, source, matrices, fixed).close()
        return gguf_layout.padded(path.stat().st_size)


def _cut_header_bytes(source: Source, weights: Mapping[str, Weight]) -> int:
    """What belongs to no tensor of the network, at its longest: with all blocks, and the sizes of each, whatever these are."""
    config = copy.deepcopy(source.config)
    describe(config, {0: {"intermediate_size": config.intermediate_size + 1}})
    fixed = {name: tensor for name, tensor in source.passthrough.items() if name not in weights}
    uneven = replace(source, config=config, passthrough=fixed)
    with network.quiet():
        tables = gguf_metadata.rotary_tensors(config, gguf_layout.kind(uneven)).values()
        in_all = _header_bytes(uneven, weights.values(), gguf_layout.fixed_tensors(uneven))
    return in_all + sum(gguf_layout.padded(4 * table.numel()) for table in tables)


def _matrix(shape: torch.Size) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def _of_zeros(whole: Sizes, hidden: int) -> tuple[int, int]:
    """Bytes of a group of heads of zeros, and of so many channels, each with its norm."""
    wide, narrow, channels = whole.heads * whole.head_dim, whole.head_dim, min(CHANNELS, whole.channels)
    group = [(wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide)]
    feed_forward = [(channels, hidden), (channels, hidden), (hidden, channels)]
    found = [sum(gguf_layout.padded(registry.get(zeros(shape)).bytes_(shape)) for shape in shapes) for shapes in (group, feed_forward)]
    norm = gguf_layout.padded(4 * hidden)
    return norm + found[0], norm + found[1]


TARGET = LlamaCpp()
