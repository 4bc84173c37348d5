"""Latency as a cost: what each module of a network takes on one device, measured; refused on any other.

A table says what the attention of every number of key/value groups and the feed-forward of every width that a search may choose take, by
what networks of such modules were found to take. What is left of the whole network's time (embedding, head, last norm, and what runs where
a module is left out) is its `rest`, so a network's latency is predicted as the rest and the sum of its modules, after ZipLM
(https://arxiv.org/abs/2302.04089), section 3.2.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from anyfit.core.errors import UserError
from anyfit.core.files import read_json, write_json

ATTENTION, FEED_FORWARD = "attention", "feed_forward"
KINDS = (ATTENTION, FEED_FORWARD)
PREFILL, DECODE = "prefill", "decode"
PHASES = (PREFILL, DECODE)
_VERSION = 5
_Part = TypeVar("_Part", "Device", "Setting", "Shape")


@dataclass(frozen=True)
class Device:
    """Whose latencies these are. `cores` are those that the process may use, `threads` those that the runtime was told to."""

    processor: str
    cores: int
    runtime: str
    threads: int

    @classmethod
    def here(cls, runtime: str, threads: int) -> Device:
        """This machine with a runtime, given as its name and version."""
        return cls(_processor(), cores(), runtime, threads)

    def __str__(self) -> str:
        return f"{self.runtime} with {self.threads} thread{'s' if self.threads > 1 else ''} on {self.processor}"

    def differences(self, here: Device) -> str:
        """Where another device is not this one, for a person to read; empty where it is."""
        return _differences(self, here)


@dataclass(frozen=True)
class Setting:
    """What one run computes: `sequence` tokens of each of `batch` texts at once, or (`decode`) the one that comes after so many."""

    batch: int
    sequence: int
    phase: str = PREFILL

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise UserError(f"There is no phase {self.phase!r}.", remedy=f"There are: {', '.join(PHASES)}.")
        if self.batch < 1 or self.sequence < 1:
            raise UserError(f"A batch of {self.batch} texts of {self.sequence} tokens can't be run.", remedy="Give numbers from 1 on.")

    def __str__(self) -> str:
        if self.phase == PREFILL:
            return f"{self.batch} x {self.sequence} tokens at once"
        return f"one token{'' if self.batch == 1 else f' of each of {self.batch} texts'} after {self.sequence}"


@dataclass(frozen=True)
class Shape:
    """What a network's time depends on: its kind, the sizes of its blocks, and the numbers that come `out` for each position. `queries`:
    query heads that share a key/value group."""

    kind: str
    hidden: int
    head_dim: int
    queries: int
    groups: int
    width: int
    blocks: int
    out: int

    def full(self, kind: str) -> int:
        """The uncut size of a module: groups of an attention, width of a feed-forward."""
        return self.groups if kind == ATTENTION else self.width

    @property
    def uncut(self) -> list[tuple[int, int]]:
        """Groups and width of each block."""
        return [(self.groups, self.width)] * self.blocks


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds. `whole` by format; `modules` by (kind, size, format), the size counted as in `Shape.full`: what they are expected to
    take. `margins`, by format: how many times that they count for where a budget is to be kept. `last`: the share of it that the
    feed-forward of the last block takes, see `parts`."""

    target: str
    device: Device
    setting: Setting
    shape: Shape
    whole: Mapping[str, float]
    modules: Mapping[tuple[str, int, str], float]
    margins: Mapping[str, float]
    last: float = 1.0

    def sizes(self, kind: str, format_: str) -> list[int]:
        """The sizes that were measured, smallest first."""
        return sorted(size for own, size, name in self.modules if (own, name) == (kind, format_))

    def ms(self, kind: str, size: int, format_: str) -> float:
        """What one module takes; nothing where it is left out (size 0). Raises `UserError` for one that wasn't measured."""
        if size == 0:
            return 0.0
        if (kind, size, format_) not in self.modules:
            measured = ", ".join(map(str, self.sizes(kind, format_))) or "none"
            raise UserError(f"The latency of {kind} of size {size} in {format_} was not measured.", remedy=f"Measured sizes: {measured}.")
        return self.modules[kind, size, format_]

    def at_most(self, kind: str, size: int, format_: str) -> float:
        """What one module counts for where a budget is to be kept: no more than a whole one, if it isn't expected to take more."""
        own, full = self.ms(kind, size, format_), self.ms(kind, self.shape.full(kind), format_)
        return max(own, min(self.margins[format_] * own, full))

    def rest(self, format_: str) -> float:
        """What the whole network takes besides its modules; nothing where these by themselves were measured to take more."""
        return max(0.0, self.whole[format_] - self._modules(self.ms, format_, self.shape.uncut))

    def predict(self, format_: str, blocks: Sequence[tuple[int, int]]) -> float:
        """What a network takes whose blocks have these groups and widths, 0 for what is left out."""
        return self.rest(format_) + self._modules(self.ms, format_, blocks)

    def bound(self, format_: str, blocks: Sequence[tuple[int, int]]) -> float:
        """What it counts for where a budget is to be kept: a search, which adds up single decisions, counts no less."""
        return self.rest(format_) + self._modules(self.at_most, format_, blocks)

    def _modules(self, of: Callable[[str, int, str], float], format_: str, blocks: Sequence[tuple[int, int]]) -> float:
        return sum(share * of(kind, size, format_) for kind, size, share in parts(blocks, self.last))

    def to_json(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "target": self.target,
            "device": asdict(self.device),
            "setting": asdict(self.setting),
            "shape": asdict(self.shape),
            "whole": dict(self.whole),
            "margins": dict(self.margins),
            "last": self.last,
            "modules": [{"kind": k, "size": size, "format": name, "ms": ms} for (k, size, name), ms in sorted(self.modules.items())],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Raises `ValueError`, `TypeError` or `KeyError` for what `to_json` doesn't make."""
        made = cls(
            data["target"],
            _made(Device, data["device"]),
            _made(Setting, data["setting"]),
            _made(Shape, data["shape"]),
            dict(data["whole"]),
            {(row["kind"], row["size"], row["format"]): row["ms"] for row in data["modules"]},
            dict(data["margins"]),
            data["last"],
        )
        if not isinstance(made.target, str):
            raise TypeError("the target is no name")
        if not all(0 <= ms < math.inf for ms in made.modules.values()) or not all(0 < ms < math.inf for ms in made.whole.values()):
            raise ValueError("not all latencies are milliseconds")
        if not 0 <= made.last <= 1 or not all(1 <= margin < math.inf for margin in made.margins.values()):
            raise ValueError("a share or a margin is none")
        if not made.whole.keys() == made.margins.keys() == {format_ for _, _, format_ in made.modules}:
            raise ValueError("the network and its modules were timed in different formats")
        return made

    def __str__(self) -> str:
        margins = ", ".join(f"{margin - 1:.1%} ({name})" for name, margin in self.margins.items())
        return (
            f"Milliseconds are those of {self.setting}, as measured in {self.device}. So that budgets are kept, smaller modules count for "
            f"more than they are expected to take, for errors of prediction and for chance: {margins}."
        )

    @property
    def digest(self) -> str:
        """Of all that was measured."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def write(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> LatencyTable:
        """Raises `UserError` where the file is no table of this version. Whose it is, `require` looks at."""
        try:
            data = read_json(path)
            if data is None:
                raise UserError(f"There is no file {path}.", remedy="Make one with `anyfit measure`.")
            if data["version"] != _VERSION:
                raise UserError(f"{path} has the version {data['version']}, not {_VERSION}.", remedy="Measure again.")
            return cls.from_json(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no table of latencies.", remedy="Make one with `anyfit measure`.") from error

    def require(self, here: Device) -> None:
        """Raises `UserError` where these latencies are another device's than this."""
        if differences := self.device.differences(here):
            raise UserError(f"These latencies are another device's: {differences}.", remedy="Measure again on this one.")

    def require_of(self, shape: Shape) -> None:
        """Raises `UserError` where these latencies are another network's than one of this shape."""
        if differences := _differences(self.shape, shape):
            raise UserError(f"These latencies are another network's: {differences}.", remedy="Measure this one.")


def parts(blocks: Sequence[tuple[int, int]], last: float) -> Iterator[tuple[str, int, float]]:
    """Kind and size of what isn't left out, and the share of its time that it takes where it is: all of it, but for the feed-forward of
    the last block that isn't left out whole, which takes `last`. It is less where a runtime goes on with some positions only after the
    last attention."""
    final = max((index for index, block in enumerate(blocks) if any(block)), default=-1)
    for index, block in enumerate(blocks):
        for kind, size in zip(KINDS, block, strict=True):
            if size:
                yield kind, size, last if kind == FEED_FORWARD and index == final else 1.0


def _made(kind: type[_Part], data: Mapping[str, Any]) -> _Part:
    """Raises `TypeError` where a field is missing, left over, or of another type."""
    if wrong := [field.name for field in fields(kind) if type(data[field.name]).__name__ != field.type]:
        raise TypeError(f"{', '.join(wrong)} of another type")
    return kind(**data)


def _differences(own: Device | Shape, other: Device | Shape) -> str:
    """Where another is not this one, for a person to read."""
    pairs = ((field.name, getattr(own, field.name), getattr(other, field.name)) for field in fields(own))
    return "; ".join(f"{name} {value} and not {their}" for name, value, their in pairs if value != their)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor as the system names it, with the numbers that tell its makes apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.partition(":")[::2] for line in lines)
    known = {name.strip(): value.strip() for name, value in facts.items()}
    numbers = [f"{name} {known[name]}" for name in ("cpu family", "model", "stepping", "cache size") if name in known]
    return ", ".join([known.get("model name", platform.machine()), *numbers])
