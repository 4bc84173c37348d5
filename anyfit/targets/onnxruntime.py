"""ONNX Runtime: a folder with one graph of any mixture of 2, 4 and 8 bits, run by its kernels for small integers.

The graph is what torch exports of the network: see `onnx_graph`. Parameters that
nobody decides about are kept in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.activations import unrounded
from anyfit.architectures import architecture_of
from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.errors import FamilyError
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.costs.stopwatch import Stopwatch
from anyfit.elastic.extracted import Extracted, InMemory
from anyfit.formats import INTEGER_GROUPS
from anyfit.structure.space import Storage
from anyfit.targets import onnx_file, onnx_graph, onnxruntime_check
from anyfit.targets.base import Check, Cut, CutTarget, Variants
from anyfit.targets.onnx_file import Layout, Place
from anyfit.targets.onnxruntime_stopwatch import OnnxRuntimeStopwatch
from anyfit.targets.safetensors_file import EMPTY_BYTES, Slot, write_file
from anyfit.targets.transformers import copy_companions


class OnnxRuntime(CutTarget):
    """Every matrix is decided by itself; see `onnx_file` for what a file is made of."""

    name = "onnxruntime"
    suffix = ""
    formats = (
        *("F32", "F16"),
        *(f"int8_{kind}{group}" for kind in onnx_file.KINDS for group in INTEGER_GROUPS.values()),
        *onnx_file.ROUNDED,
        *(f"int{bits}_{kind}{group}" for bits in onnx_file.BITS[1:] for kind in onnx_file.KINDS for group in INTEGER_GROUPS.values()),
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
        wanted = self.named(formats)
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

    def dense(self, source: Source) -> str:
        return "F32"

    def storage(self, source: Source, formats: Sequence[str]) -> Storage:
        """Dense is float32; matrices may be in the integers that the runtime multiplies."""
        graph, model = onnx_graph.of(source), source.skeleton()
        weights = {weight.name: weight for weight in architecture_of(model).weights(model)}
        whole = _cut_layout(graph, model, {}, {})

        def place(name: str, shape: torch.Size) -> Place:
            rows, columns = reversed(shape) if weights[name].transposed else shape
            return Place(replace(weights[name], shape=(rows, columns)), graph)

        def bytes_(name: str, shape: torch.Size, format_: str) -> tuple[int, int]:
            if name not in graph.open:
                return 0, 0
            slots = place(name, shape).slots(format_) if name in weights else (Slot(name, torch.float32, tuple(shape)),)
            size = place(name, shape).bytes_(format_) if name in weights else slots[0].bytes_
            return size, sum(slot.data_bytes for slot in slots)

        def refuses(name: str, shape: torch.Size, format_: str) -> str | None:
            return place(name, shape).refuses(format_) if name in weights else None

        # The graph of a cut network has no other nodes than this one's, but blocks of different sizes don't share constants.
        sizes = sum(bytes_(slot.name, torch.Size(slot.shape), "F32")[0] for slot in whole.slots)
        return Storage(self.dense(source), bytes_, refuses, whole.bytes_ - sizes + graph.unshared_bytes)

    def write_cut(self, path: Path, source: Source, cut: Cut) -> int:
        layout, numbers = _layout_of_cut(cut), dict(cut.model.named_parameters())
        path.mkdir()
        (path / onnx_file.GRAPH).write_bytes(layout.content)
        fixed = ((slot.name, numbers[slot.name]) for slot in layout.fixed)
        made = (pair for place, name in layout.chosen for pair in place.tensors(name, cut.variants(place.weight.name, name)).items())
        size = write_file(path / onnx_file.NUMBERS, layout.slots, chain(fixed, made))
        copy_companions(source, path)
        return len(layout.content) + size

    def check_cut(self, path: Path, source: Source, cut: Cut, tokens: Tensor) -> tuple[Check, ...]:
        return onnxruntime_check.checks(path, _layout_of_cut(cut), InMemory(cut.model), tokens)

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


_LAYOUTS: WeakKeyDictionary[Cut, Layout] = WeakKeyDictionary()


def _layout_of_cut(cut: Cut) -> Layout:
    """The model keeps its numbers. Exporting takes seconds, and what writes a network also checks it, so that it is remembered."""
    if cut in _LAYOUTS:
        return _LAYOUTS[cut]
    model = cut.model
    open_ = {id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), False) for parameter in model.parameters()}
    weights = {weight.name: weight for weight in architecture_of(model).weights(model)}
    with unrounded(model):  # who writes a matrix's nodes writes what rounds its inputs
        graph = onnx_graph.export(copy.deepcopy(model, open_))
    _LAYOUTS[cut] = _cut_layout(graph, model, weights, cut.formats)
    return _LAYOUTS[cut]


def _cut_layout(graph: onnx_graph.Graph, model: PreTrainedModel, weights: Mapping[str, Weight], formats: Mapping[str, str]) -> Layout:
    """Those of the `weights` that have one of `formats` in it, everything else in float32."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fixed = [Slot(name, torch.float32, shape) for name, shape in shapes.items() if name in graph.open and name not in formats]
    return Layout.of(graph, ((Place(weights[name], graph), format_) for name, format_ in formats.items()), fixed)


def _fixed(source: Source, graph: onnx_graph.Graph) -> list[Slot]:
    """The parameters that nobody decides about and that the graph reads, in float32."""
    return [Slot(name, torch.float32, tuple(tensor.shape)) for name, tensor in source.passthrough.items() if name in graph.open]


TARGET = OnnxRuntime()
