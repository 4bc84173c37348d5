"""ONNX Runtime: a folder with one graph of any mixture of 2, 4 and 8 bits, run by its kernels for small integers.

The graph is what torch exports of the network: tokens in, logits out, any batch and length, no cache. Parameters that
nobody decides about are kept in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.errors import FamilyError, UnknownNameError
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.costs.stopwatch import Stopwatch
from anyfit.elastic.extracted import Extracted, InMemory
from anyfit.formats import INTEGER_GROUPS
from anyfit.structure.levels import Structure
from anyfit.structure.space import Measured, pruned_space
from anyfit.targets import onnx_file, onnx_graph, onnxruntime_check
from anyfit.targets.base import Check, Target, Variants
from anyfit.targets.onnx_file import Layout, Place
from anyfit.targets.onnxruntime_stopwatch import OnnxRuntimeStopwatch
from anyfit.targets.safetensors_file import EMPTY_BYTES, Slot, write_file
from anyfit.targets.transformers import copy_companions


class OnnxRuntime(Target):
    """Every matrix is decided by itself; see `onnx_file` for what a file is made of."""

    name = "onnxruntime"
    suffix = ""
    formats = (
        *("F32", "F16"),
        *(f"int{bits}_{kind}{group}" for bits in onnx_file.BITS for kind in onnx_file.KINDS for group in INTEGER_GROUPS.values()),
    )
    default_formats = ("F16", "int8_sym", "int4_asym", "int4_sym_g128", "int2_asym")

    def supports(self, source: Source) -> str | None:
        try:
            onnx_graph.of(source)
        except onnx_graph.ExportError as error:
            return f"torch can't export this network to ONNX: {error}"
        return None

    def space(self, source: Source, weights: Iterable[Weight], formats: Iterable[str]) -> Space:
        """See `Target.space`."""
        wanted = list(dict.fromkeys(formats))
        for name in wanted:
            if name not in self.formats:
                raise UnknownNameError(f"format of {self.name}", name, self.formats)
        graph = onnx_graph.of(source)
        places = [Place(weight, graph) for weight in weights]
        fixed = _fixed(source, graph)
        return Space(
            decisions=tuple(self._decision(place, wanted) for place in places),
            fixed_bytes=EMPTY_BYTES + sum(slot.bytes_ for slot in fixed) + onnx_file.fixed_bytes(graph, places, fixed),
            fixed_stored_bytes=sum(slot.data_bytes for slot in fixed),
            num_parameters=sum(p.weight.num_weights for p in places) + sum(tensor.numel() for tensor in source.passthrough.values()),
        )

    def write(self, path: Path, source: Source, space: Space, config: Config, variants: Variants) -> int:
        """See `Target.write`. Raises `FamilyError` where this version of torch exports another graph than the family counts on."""
        layout = _layout(source, (weight for decision in space.decisions for weight in decision.unit.weights), config)
        if layout.bytes_ != space.bytes_(config):
            raise FamilyError(
                f"torch {torch.__version__} exports a graph of another size than the one that the family was made with.",
                remedy="Use the versions of torch and onnxscript that the family was made with, or fit again.",
            )
        path.mkdir()
        (path / onnx_file.GRAPH).write_bytes(layout.content)
        fixed = ((slot.name, source.read(slot.name).to(slot.dtype)) for slot in layout.fixed)
        made = (pair for place, name in layout.chosen for pair in place.tensors(name, variants(place.weight.name, name)).items())
        size = write_file(path / onnx_file.NUMBERS, layout.slots, chain(fixed, made))
        copy_companions(source, path)
        return len(layout.content) + size

    def check(self, path: Path, source: Source, config: Config, model: Extracted, tokens: Tensor) -> tuple[Check, ...]:
        return onnxruntime_check.checks(path, _layout(source, model.weights.values(), config), model, tokens)

    def stopwatch(self) -> Stopwatch:
        return OnnxRuntimeStopwatch(self.formats)

    def cut_space(
        self, source: Source, architecture: Architecture, found: Mapping[str, Structure], length: int, measured: Measured | None
    ) -> Space:
        def bytes_(name: str, shape: torch.Size) -> tuple[int, int]:
            slot = Slot(name, torch.float32, tuple(shape))
            return slot.bytes_, slot.data_bytes

        whole = _cut_layout(source.frame())
        fixed = whole.bytes_ - sum(slot.bytes_ for slot in whole.slots)  # the graph of a cut network is no longer than this one's
        return pruned_space(source, architecture, found, length=length, bytes_=bytes_, fixed_bytes=fixed, measured=measured)

    def cut_format(self, source: Source) -> str:
        return "F32"

    def write_cut(self, path: Path, source: Source, model: PreTrainedModel) -> int:
        layout, numbers = _cut_layout(model), dict(model.named_parameters())
        path.mkdir()
        (path / onnx_file.GRAPH).write_bytes(layout.content)
        size = write_file(path / onnx_file.NUMBERS, layout.slots, ((slot.name, numbers[slot.name]) for slot in layout.slots))
        copy_companions(source, path)
        return len(layout.content) + size

    def check_cut(self, path: Path, source: Source, model: PreTrainedModel, tokens: Tensor) -> tuple[Check, ...]:
        return onnxruntime_check.checks(path, _cut_layout(model), InMemory(model), tokens)

    def _decision(self, place: Place, wanted: Sequence[str]) -> Decision:
        legal, refused = set(), {}
        for name in wanted:
            reason = place.refuses(name)
            substitute = name if reason is None else place.substitute(name)
            legal.add(substitute)
            if reason is not None:
                refused[name] = f"{reason}; {substitute} takes its place"
        choices = tuple(
            Choice(name, place.bytes_(name), sum(slot.data_bytes for slot in place.slots(name))) for name in self.formats if name in legal
        )
        return Decision(Unit(place.weight.name, (place.weight,)), choices, refused=refused)


def _layout(source: Source, weights: Iterable[Weight], config: Config) -> Layout:
    graph = onnx_graph.of(source)
    return Layout.of(graph, ((Place(weight, graph), config.format(weight.name)) for weight in weights), _fixed(source, graph))


def _cut_layout(model: PreTrainedModel) -> Layout:
    """Every parameter in float32. The model keeps its own."""
    parameters = dict(model.named_parameters())
    open_ = {id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), False) for parameter in parameters.values()}
    graph = onnx_graph.export(copy.deepcopy(model, open_))
    fixed = (Slot(name, torch.float32, tuple(parameter.shape)) for name, parameter in parameters.items() if name in graph.open)
    return Layout.of(graph, (), fixed)


def _fixed(source: Source, graph: onnx_graph.Graph) -> list[Slot]:
    """The parameters that nobody decides about and that the graph reads, in float32."""
    return [Slot(name, torch.float32, tuple(tensor.shape)) for name, tensor in source.passthrough.items() if name in graph.open]


TARGET = OnnxRuntime()
