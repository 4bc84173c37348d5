"""Networks ready to be timed in ONNX Runtime: exported and written as any model is, with numbers that nobody computed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anyfit.architectures import architecture_of
from anyfit.architectures.base import is_matrix
from anyfit.core.errors import RuntimeMissingError, UserError
from anyfit.core.units import Weight
from anyfit.costs.latency import DECODE, Setting
from anyfit.costs.stopwatch import Run, Stopwatch
from anyfit.interface import interface_of
from anyfit.structure.cutting import sizes
from anyfit.targets import onnx_graph, onnxruntime_session
from anyfit.targets.onnx_file import ENCODERS_ONLY, GRAPH, NUMBERS, ROUNDED, Layout, Place
from anyfit.targets.onnx_graph import Graph
from anyfit.targets.safetensors_file import Slot, write_file


class OnnxRuntimeStopwatch(Stopwatch):
    """With `accuracy_level` as it is written, the one that people run."""

    def __init__(self, formats: tuple[str, ...]) -> None:
        self.formats = formats
        self._graphs: dict[str, dict[int, Graph]] = {}
        try:
            self.runtime = f"onnxruntime {version(onnxruntime_session.PACKAGE)}"
        except PackageNotFoundError as error:
            raise RuntimeMissingError(onnxruntime_session.PACKAGE, onnxruntime_session.EXTRA, "Measuring latency") from error

    def ready(self, model: PreTrainedModel, format_: str, setting: Setting, threads: int, folder: Path) -> Run:
        """See `Stopwatch.ready`. Raises `UserError` for the decode phase of a network whose cache can't be exported, and for a format that
        no matrix of it can be in."""
        graph = self._graph(model)
        if format_ in ROUNDED and graph.remembers:
            raise UserError(f"No matrix of this network can be in {format_}: {ENCODERS_ONLY}.", remedy="Leave that format out.")
        if setting.phase == DECODE and not graph.remembers and _has_attention(model):
            raise UserError("torch can't export this network's cache to ONNX, so there is no decode phase.", remedy="Measure prefill.")
        layout = _layout(model, graph, format_)
        (folder / GRAPH).write_bytes(layout.content)
        write_file(folder / NUMBERS, layout.slots, _numbers(layout))
        session = onnxruntime_session.opened(folder, threads=threads)
        interface = interface_of(model.config)
        segments = interface.example(model.config, setting.batch, setting.sequence)
        outputs = [item.name for item in session.get_outputs()]
        inputs = _placed(onnxruntime_session.feed(session, interface, segments))
        if setting.phase == DECODE:
            given = session.run_with_ort_values(outputs, inputs)
            last = _placed(onnxruntime_session.feed(session, interface, segments[:, -1:].contiguous()))
            inputs = last | onnxruntime_session.after(session, given)
        return lambda: session.run_with_ort_values(outputs, inputs)

    def _graph(self, model: PreTrainedModel) -> Graph:
        """Exporting takes seconds. Where graphs of two widths are the same, so are those of all others."""
        width, config = sizes(model, architecture_of(model))[0].channels, model.config.to_dict()
        config.pop("per_layer_config", None)  # told by the modules, too
        modules = [(name, type(module).__name__) for name, module in model.named_modules()]
        shapes = [(name, [None if size == width else size for size in tensor.shape]) for name, tensor in model.named_parameters()]
        known = self._graphs.setdefault(json.dumps([modules, shapes, config], default=str, sort_keys=True), {})
        if width not in known:
            contents = [graph.content for graph in known.values()]
            known[width] = known[min(known)] if len(known) > 1 and len(set(contents)) == 1 else onnx_graph.export(model)
        return known[width]


def _has_attention(model: PreTrainedModel) -> bool:
    return any(own.groups for own in sizes(model, architecture_of(model)))


def _placed(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Inputs where the runtime reads them, so that a run copies nothing."""
    from onnxruntime import OrtValue

    return {name: OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()}


def _layout(model: PreTrainedModel, graph: Graph, format_: str) -> Layout:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in graph.open}
    places = [Place(weight, graph) for weight in _matrices(model) if weight.name in shapes]
    decided = {place.weight.name for place in places}
    fixed = [Slot(name, torch.float32, shape) for name, shape in shapes.items() if name not in decided]
    return Layout.of(graph, ((place, format_ if place.refuses(format_) is None else place.substitute(format_)) for place in places), fixed)


def _matrices(model: PreTrainedModel) -> Iterator[Weight]:
    """Every matrix; an architecture can't tell them where a network lacks modules."""
    for path, module in model.named_modules():
        if is_matrix(module) or isinstance(module, nn.Embedding):
            transposed = isinstance(module, Conv1D)
            rows, columns = reversed(module.weight.shape) if transposed else module.weight.shape
            yield Weight(f"{path}.weight", (rows, columns), "", None, transposed=transposed)


def _numbers(layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Of the size that a network's are, so that nothing overflows or vanishes on the way."""
    rng = torch.Generator().manual_seed(0)
    for slot in layout.slots:
        if not slot.dtype.is_floating_point:
            bounds = torch.iinfo(slot.dtype)
            yield slot.name, torch.randint(bounds.min, bounds.max + 1, slot.shape, generator=rng, dtype=slot.dtype)
        else:
            values = 0.02 * torch.randn(slot.shape, generator=rng)
            yield slot.name, (values if slot.shape else values.abs()).to(slot.dtype)  # the scale of what is rounded is positive
