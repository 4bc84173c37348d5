"""What it takes to set a config, by what an elastic network's choices are stored as."""

from __future__ import annotations

import timeit
from statistics import median
from typing import Any

import torch
from table import Row, Section
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyfit.architectures import architecture_of
from anyfit.checkpoint import Checkpoint
from anyfit.core.config import Config
from anyfit.core.space import Choice, Decision
from anyfit.core.units import Unit, Weight
from anyfit.elastic.base import Elastic
from anyfit.elastic.linear import ElasticNetwork
from anyfit.elastic.nested import NestedNetwork
from anyfit.formats import formats
from anyfit.formats.aqlm import AdditiveFormat
from anyfit.formats.base import GridFormat, quantize
from anyfit.quantizers import aqlm
from anyfit.training import uniform
from anyfit.tuning.coded import Coded, Stored
from anyfit.zoo import MODEL

STORAGES: dict[str, tuple[str, ...]] = {
    "decoupled, offsets": ("int4_offset", "int2_offset"),
    "decoupled, codebooks": ("aqlm_2x8g8", "aqlm_1x8g8"),
    "nested": ("8", "2"),
}
ROUNDS, TIMES = 31, 200
MOST_MICROSECONDS = 10.0
"""Of a layer: no more than that is some microseconds."""


def section() -> Section:
    """The first block's matrices, in each storage."""
    rows = []
    for name, choices in STORAGES.items():
        network = _network(choices)
        configs = [uniform(network.decisions, choice) for choice in choices]
        seconds = median(timeit.repeat(lambda: _switched(network, configs), number=TIMES, repeat=ROUNDS)) / TIMES / len(configs)  # noqa: B023
        each = 1e6 * seconds / len(network.layers)
        with _Operations() as operations:
            _switched(network, configs)
        cells = (name, " and ".join(choices), f"{each:.2f}", str(operations.number))
        print("  ".join(cells), flush=True)
        rows.append(Row(cells, each <= MOST_MICROSECONDS and operations.number == 0))
    remark = (
        f"The matrices of the embedded default's first block, two configs by turns; the median of {ROUNDS} times {TIMES}. A row holds at "
        f"up to {MOST_MICROSECONDS:g} microseconds, where torch computes and allocates nothing."
    )
    return Section("Setting a config", ("storage", "choices", "microseconds a layer", "operations of torch"), rows, (remark,))


def _switched(network: Elastic[Any], configs: list[Config]) -> None:
    for config in configs:
        network.set(config)


class _Operations(TorchDispatchMode):
    """Counts what torch computes or allocates."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def _network(choices: tuple[str, ...]) -> Elastic[Any]:
    """The embedded default, whose first block has these choices."""
    model = Checkpoint.open(MODEL).load()
    weights = [weight for weight in architecture_of(model).weights(model) if weight.block == 0]
    if choices[0] in formats:
        matrices = {w.name: {name: _rounded(name, w, model.get_parameter(w.name).detach()) for name in choices} for w in weights}
        sizes = {w.name: {name: formats.get(name).bytes_(w.shape) for name in choices} for w in weights}
        about = [Decision(Unit(w.name, (w,)), tuple(Choice(name, size, size) for name, size in sizes[w.name].items())) for w in weights]
        return ElasticNetwork(model, about, matrices, rank=64, seed=0)
    return NestedNetwork(model, [weight.name.removesuffix(".weight") for weight in weights], [int(bits) for bits in choices], 32)


def _rounded(name: str, weight: Weight, values: Tensor) -> Stored:
    format_ = formats.get(name)
    if isinstance(format_, AdditiveFormat):
        return Stored(weight, format_, aqlm.encode(format_, values, torch.eye(values.shape[1])), None)
    assert isinstance(format_, GridFormat)
    scales = format_.fit(values, torch.ones(values.shape[1]))
    codes, _ = quantize(format_, values, *(part.repeat_interleave(format_.group, 1) for part in (scales.scale, scales.offset)))
    return Stored(weight, format_, Coded(format_, codes, scales).data, None)
