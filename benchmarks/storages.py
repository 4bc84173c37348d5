"""What it takes to set a config, by what an elastic network's choices are stored as."""

from __future__ import annotations

import timeit
from statistics import median
from typing import Any

from table import Row, Section

from anyfit.architectures import architecture_of
from anyfit.checkpoint import Checkpoint
from anyfit.core.config import Config
from anyfit.core.space import Choice, Decision
from anyfit.core.units import Unit
from anyfit.elastic.base import Elastic
from anyfit.elastic.linear import ElasticNetwork
from anyfit.elastic.nested import NestedNetwork
from anyfit.formats import formats
from anyfit.testing.counting import Operations
from anyfit.testing.quantizers import rounded
from anyfit.training import uniform
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
        with Operations() as operations:
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


def _network(choices: tuple[str, ...]) -> Elastic[Any]:
    """The embedded default, whose first block has these choices."""
    model = Checkpoint.open(MODEL).load()
    weights = [weight for weight in architecture_of(model).weights(model) if weight.block == 0]
    if choices[0] in formats:
        matrices = {w.name: {name: rounded(w, name, model.get_parameter(w.name)) for name in choices} for w in weights}
        sizes = {w.name: {name: formats.get(name).bytes_(w.shape) for name in choices} for w in weights}
        about = [Decision(Unit(w.name, (w,)), tuple(Choice(name, size, size) for name, size in sizes[w.name].items())) for w in weights]
        return ElasticNetwork(model, about, matrices, rank=64, seed=0)
    return NestedNetwork(model, [weight.name.removesuffix(".weight") for weight in weights], [int(bits) for bits in choices], 32)
