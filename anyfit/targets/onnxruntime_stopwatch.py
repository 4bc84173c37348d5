"""Networks ready to be timed in ONNX Runtime: exported and written as any model is, with numbers that nobody computed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.core.errors import RuntimeMissingError
from anyfit.costs.latency import PREFILL, Setting
from anyfit.costs.stopwatch import Run, Stopwatch
from anyfit.targets import onnx_graph, onnxruntime_session
from anyfit.targets.onnx_file import GRAPH, NUMBERS, Layout, Place
from anyfit.targets.onnx_graph import LOGITS, TOKENS
from anyfit.targets.safetensors_file import Slot, write_file


class OnnxRuntimeStopwatch(Stopwatch):
    """With `accuracy_level` as it is written, the one that people run."""

    def __init__(self, formats: tuple[str, ...]) -> None:
        self.formats = formats
        try:
            self.runtime = f"onnxruntime {version(onnxruntime_session.PACKAGE)}"
        except PackageNotFoundError as error:
            raise RuntimeMissingError(onnxruntime_session.PACKAGE, onnxruntime_session.EXTRA, "Measuring latency") from error

    def refuses(self, setting: Setting) -> str | None:
        return (
            None if setting.phase == PREFILL else "The graphs that are written for ONNX Runtime keep no cache, so there is no decode phase."
        )

    def ready(self, model: PreTrainedModel, format_: str, setting: Setting, threads: int, folder: Path) -> Run:
        layout = _layout(model, format_)
        (folder / GRAPH).write_bytes(layout.content)
        write_file(folder / NUMBERS, layout.slots, _numbers(layout))
        session = onnxruntime_session.opened(folder, threads=threads)
        tokens = torch.arange(setting.batch * setting.sequence).reshape(setting.batch, -1) % model.config.vocab_size
        feed = {TOKENS: tokens.numpy()}
        return lambda: session.run([LOGITS], feed)


def _layout(model: PreTrainedModel, format_: str) -> Layout:
    weights = list(architecture_of(model).weights(model))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    graph = onnx_graph.export(model)
    places = [Place(weight, graph) for weight in weights if weight.name in graph.open]
    decided = {place.weight.name for place in places}
    fixed = [Slot(name, torch.float32, shape) for name, shape in shapes.items() if name in graph.open - decided]
    return Layout.of(graph, ((place, format_ if place.refuses(format_) is None else place.substitute(format_)) for place in places), fixed)


def _numbers(layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Of the size that a network's are, so that nothing overflows or vanishes on the way."""
    rng = torch.Generator().manual_seed(0)
    for slot in layout.slots:
        if slot.dtype == torch.uint8:
            yield slot.name, torch.randint(256, slot.shape, generator=rng, dtype=torch.uint8)
        else:
            yield slot.name, (0.02 * torch.randn(slot.shape, generator=rng)).to(slot.dtype)
