"""What must hold of any target: run each of `CHECKS` on a `Trial` of a network that the target supports.

    trial = Trial.of(TARGET, save_tiny(folder / "model", "llama"))
    for check in CHECKS:
        check(trial, folder / check.__name__)

`trial` stands for a finished family: its variants are rounded to nearest, when they are first asked for.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.calibration.statistics import InputStatistics
from anyfit.checkpoint import Checkpoint, Source
from anyfit.core.config import Config
from anyfit.core.effort import Effort
from anyfit.core.errors import UnknownNameError
from anyfit.core.space import Space
from anyfit.core.units import Weight
from anyfit.elastic.extracted import Extracted
from anyfit.family.store import Decoder
from anyfit.formats import formats
from anyfit.quantizers.rtn import QUANTIZER
from anyfit.targets.base import ALL, Check, Target

NUM_CONFIGS = 4


@dataclass(frozen=True)
class Trial:
    """One network on its way through one target."""

    target: Target
    source: Source
    weights: tuple[Weight, ...]
    space: Space
    original: PreTrainedModel
    wanted: tuple[str, ...]
    _variants: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Target, folder: Path, wanted: tuple[str, ...] | None = None) -> Trial:
        """For the model in `folder` and the formats `wanted`, all of the target's where none are named."""
        checkpoint = Checkpoint.open(folder)
        original = checkpoint.load()
        weights = tuple(architecture_of(original).weights(original))
        source = checkpoint.source(weights)
        reason = target.supports(source)
        assert reason is None, reason
        wanted = wanted or target.formats
        return cls(target, source, weights, target.space(source, weights, wanted), original, wanted)

    def config(self, seed: int) -> Config:
        """A random choice for every decision."""
        rng = random.Random(seed)
        return Config({d.key: rng.choice(d.choices).name for d in self.space.decisions})

    def variant(self, name: str, format_: str, which: Tensor | slice = ALL) -> Tensor:
        """uint8 (data_rows, row_bytes), all rows or some, in the target's order."""
        if (name, format_) not in self._variants:
            weight = self._weight(name)
            matrix = self.original.get_parameter(name).detach()
            matrix = matrix.T if weight.transposed else matrix
            order = self.target.row_order(self.source, weight)
            matrix = matrix.contiguous() if order is None else matrix[order]
            prepared = QUANTIZER.prepare(InputStatistics.unknown(weight.shape[1]))
            self._variants[name, format_] = QUANTIZER.encode(matrix, prepared, formats.get(format_)).data
        return formats.get(format_).rows(self._variants[name, format_], which)

    def extract(self, config: Config) -> PreTrainedModel:
        """The torch model that the written one must agree with."""
        return self.source.build({weight.name: self._decoded(weight, config.format(weight.name)) for weight in self.weights})

    def write(self, path: Path, config: Config) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.target.write(path, self.source, self.space, config, self.variant)

    def check(self, path: Path, config: Config) -> tuple[Check, ...]:
        tokens = torch.arange(96).reshape(2, 48) % self.original.config.vocab_size
        decoder = Decoder(self.variant, self.target, self.source)
        with tempfile.TemporaryDirectory() as folder:
            extracted = Extracted(self.source, config, decoder, Path(folder))
            return self.target.check(path, self.source, config, extracted, tokens)

    def _weight(self, name: str) -> Weight:
        return next(weight for weight in self.weights if weight.name == name)

    def _decoded(self, weight: Weight, format_: str) -> Tensor:
        values = formats.get(format_).decode(self.variant(weight.name, format_))
        order = self.target.row_order(self.source, weight)
        if order is not None:
            values = torch.empty_like(values).index_copy_(0, order, values)
        return values.T.contiguous() if weight.transposed else values


def check_space_covers_the_network(trial: Trial, _: Path) -> None:
    """Every matrix is in one unit, every unit has a choice, and what isn't a choice has a reason."""
    target, space = trial.target, trial.space
    assert set(target.menu(Effort.HIGH)) <= set(target.formats), "the defaults are formats of the target"
    units = [weight.name for decision in space.decisions for weight in decision.unit.weights]
    assert sorted(units) == sorted(weight.name for weight in trial.weights), "each matrix is decided once"
    for decision in space.decisions:
        names = [choice.name for choice in decision.choices]
        assert names, f"{decision.unit.name} has no choice"
        assert len(names) == len(set(names)), "a format is one choice"
        assert set(names) <= set(target.formats), "choices are formats of the target"
        assert not set(names) & set(decision.refused), "a format is a choice or refused"
        assert all(decision.refused.values()), "a refusal says why"
        assert set(trial.wanted) <= set(names) | set(decision.refused), "nothing is dropped silently"


def check_unknown_format_is_refused(trial: Trial, _: Path) -> None:
    """A name that the target doesn't know is an error that lists those it does."""
    message = ""
    try:
        trial.target.space(trial.source, trial.weights, ("no such format",))
    except UnknownNameError as error:
        message = str(error)
    assert message and all(name in message for name in trial.target.formats), "an error lists the known formats"


def check_row_orders_are_permutations(trial: Trial, _: Path) -> None:
    """Rows are moved, never lost or doubled."""
    for weight in trial.weights:
        order = trial.target.row_order(trial.source, weight)
        assert order is None or torch.equal(order.sort().values, torch.arange(weight.shape[0])), weight.name


def check_size_is_as_predicted(trial: Trial, folder: Path) -> None:
    """For the smallest, the largest and random mixed configs."""
    configs = [trial.space.smallest(), trial.space.largest(), *(trial.config(seed) for seed in range(NUM_CONFIGS))]
    for index, config in enumerate(configs):
        path = folder / f"{index}{trial.target.suffix}"
        size = trial.write(path, config)
        assert size == trial.space.bytes_(config), f"{size} bytes were written and {trial.space.bytes_(config)} predicted"
        if path.is_file():
            assert size == path.stat().st_size, "the size is that of the file"


def check_same_config_same_bytes(trial: Trial, folder: Path) -> None:
    """Written twice, under other names, by another space object: bit for bit the same."""
    config = trial.config(0)
    first, second = folder / f"a{trial.target.suffix}", folder / f"other{trial.target.suffix}"
    trial.write(first, config)
    space = trial.target.space(trial.source, trial.weights, trial.wanted)
    replace(trial, space=space).write(second, config)
    assert _content(first) == _content(second)


def check_good_passes_and_damaged_fails(trial: Trial, folder: Path) -> None:
    """All checks pass on what was written; after one bit of the weights is flipped, at least one fails."""
    config = trial.config(1)
    path = folder / f"model{trial.target.suffix}"
    trial.write(path, config)
    failed = [check for check in trial.check(path, config) if not check.passed]
    assert not failed, failed
    flip_bit(path)
    assert any(not check.passed for check in trial.check(path, config)), "a damaged weight goes unnoticed"


def flip_bit(path: Path, place: float = 0.7) -> None:
    """Flip one bit of the largest file at `path`, at `place` of its length."""
    largest = max(_files(path), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[int(place * len(content))] ^= 0x10
    largest.write_bytes(content)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _content(path: Path) -> dict[str, bytes]:
    return {"" if file == path else str(file.relative_to(path)): file.read_bytes() for file in _files(path)}


CHECKS: tuple[Callable[[Trial, Path], None], ...] = (
    check_space_covers_the_network,
    check_unknown_format_is_refused,
    check_row_orders_are_permutations,
    check_size_is_as_predicted,
    check_same_config_same_bytes,
    check_good_passes_and_damaged_fails,
)
