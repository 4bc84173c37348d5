"""Timing: the contract of a runtime's stopwatch, and how a table of latencies is measured with one."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from anyfit.core.errors import UserError
from anyfit.costs.latency import ATTENTION, DECODE, FEED_FORWARD, KINDS, Device, LatencyTable, Setting, Shape, cores
from anyfit.costs.probes import shape_of, sized
from anyfit.interface import interface_of
from anyfit.progress import Progress, Silent
from anyfit.structure.levels import widths

Run = Callable[[], object]
"""One run of a network that is ready."""
Took = Mapping[tuple[str, int], float]
"""Of modules, by kind and size, as shares of the whole network's time."""
Block = tuple[int, int]
"""Groups of its attention, width of its feed-forward."""

SECONDS, ROUNDS = 1.0, 31
"""How long a network is timed beside the whole, by the clock that counts, and in how many rounds at least."""
LONG, FEWEST = 6.0, 7
"""A network that takes so many seconds is timed in so many rounds, though."""
MIXED = (
    ((0.375, 1.0), (1.0, 0.375)),
    ((0.25, 0.75), (0.75, 0.25)),
    ((0.125, 0.375), (0.375, 0.125)),
    ((0.0, 1.0), (1.0, 0.0)),
    ((0.0, 0.5), (0.5, 0.0)),
)
"""Networks of mixed sizes: how much of its attention and of its feed-forward each block has, about, by turns. In the last ones half of the
modules are left out."""


class Stopwatch(ABC):
    """What makes networks ready to be timed in one runtime. `runtime` is its name and version."""

    runtime: str
    formats: tuple[str, ...]
    """Those that run at a speed of their own, the plainest first."""

    def refuses(self, config: PretrainedConfig) -> str | None:
        """Why it can't time modules of a network of this config; None where it can."""
        return None

    @abstractmethod
    def ready(self, model: PreTrainedModel, format_: str, setting: Setting, threads: int, folder: Path) -> Run:
        """Load a network, whose parameters are on the meta device, with any numbers, and every matrix in a format that can be.

        `folder` is an empty place on disk that lasts as long as the network is run.
        """


def measure(
    stopwatch: Stopwatch,
    config: PretrainedConfig,
    target: str,
    setting: Setting,
    *,
    formats: Iterable[str] | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LatencyTable:
    """Time a network of this config and its modules in each format (default: the stopwatch's first).

    Every network is timed beside the whole one, the two taking turns, and what counts is the median of their ratios: what
    slows the machine down for a while slows down both. So is the whole network in any format but the first, beside that.

    Modules of one kind and size are timed in the place of the whole ones, all else being whole: they are what such a network takes beyond
    one without that kind, and what the whole network takes besides its modules is the rest. As such differences needn't add up, networks of
    mixed sizes are timed, too: smaller modules count for as much more as these were found to take, and modules that are left out for what
    they leave behind, but none for more than a larger one. So predictions bound what such networks take.
    Raises `UserError` for what can't be timed.
    """
    threads, formats = threads or cores(), list(formats or stopwatch.formats[:1])
    _require(stopwatch, setting, formats, threads, config)
    shape = shape_of(config, trust_remote_code=trust_remote_code)
    setting = replace(setting, sequence=interface_of(config).length(config) or setting.sequence)
    whole: dict[str, float] = {}
    modules: dict[tuple[str, int, str], float] = {}
    ladder = {kind: sizes(shape, kind) for kind in KINDS}

    def ready(blocks: Sequence[Block], format_: str, folder: Path) -> Run:
        return stopwatch.ready(sized(config, blocks, trust_remote_code=trust_remote_code), format_, setting, threads, folder)

    def slower(format_: str) -> float:
        """How many times as long the whole network takes in a format as in the first."""
        with tempfile.TemporaryDirectory() as folder:
            plain = Clock(ready(shape.uncut, formats[0], _new(folder, "plain")), threads)
            return plain.share(ready(shape.uncut, format_, _new(folder, "whole")))

    number = len(formats) * (sum(map(len, ladder.values())) + len(MIXED))
    with pinned(threads), (progress or Silent()).stage("measure", number) as stage:
        for name in formats:
            with tempfile.TemporaryDirectory() as folder:
                clock = Clock(ready(shape.uncut, name, _new(folder, "whole")), threads)

                def share(blocks: Sequence[Block], about: str, name: str = name, clock: Clock = clock) -> float:
                    with tempfile.TemporaryDirectory() as own:
                        found = clock.share(ready(blocks, name, Path(own)))
                    stage.advance(detail=f"{about} {name}")
                    return found

                took = _modules(share, shape, ladder)
                whole[name] = whole[formats[0]] * slower(name) if whole else clock.whole
                modules |= {(*key, name): own * whole[name] for key, own in took.items()}
    return LatencyTable(target, Device.here(stopwatch.runtime, threads), setting, shape, whole, modules)


def _modules(share: Callable[[Sequence[Block], str], float], shape: Shape, ladder: Mapping[str, Sequence[int]]) -> Took:
    """What modules take, from the `share` of the whole network's time that networks take."""

    def all_of(kind: str, size: int) -> float:
        block = (size, shape.width) if kind == ATTENTION else (shape.groups, size)
        return share([block] * shape.blocks, f"{kind} {size}")

    took = dict[tuple[str, int], float]()
    for kind in KINDS:
        without = all_of(kind, 0)
        for size in ladder[kind]:
            found = 1.0 if size == shape.full(kind) else all_of(kind, size)
            took[kind, size] = max(0.0, found - without) / shape.blocks
    return _bounding(took, shape, [(mix, share(mix, "mixed sizes")) for mix in _mixes(shape.blocks, ladder)])


def _mixes(number: int, ladder: Mapping[str, Sequence[int]]) -> list[list[Block]]:
    """So many blocks of networks of mixed sizes. The last, in which runtimes leave out what nobody asks for, is between the others."""

    def size(kind: str, share: float) -> int:
        return min(ladder[kind], key=lambda size: abs(size - share * max(ladder[kind]))) if share else 0

    def nearest(shares: Sequence[float]) -> Block:
        attention, feed_forward = shares
        return size(ATTENTION, attention), size(FEED_FORWARD, feed_forward)

    found = []
    for turns in MIXED:
        between = [sum(shares) / len(turns) for shares in zip(*turns, strict=True)]
        found.append([*(nearest(turns[block % len(turns)]) for block in range(number - 1)), nearest(between)])
    return found


def _bounding(took: Took, shape: Shape, found: Iterable[tuple[Sequence[Block], float]]) -> Took:
    """As large as these networks need to take no longer than predicted: smaller modules by one factor, none more than a whole one; those
    that are left out as they then need, none more than the smallest."""
    rest = max(0.0, 1 - shape.blocks * sum(took[kind, shape.full(kind)] for kind in KINDS))
    networks = [([key for block in blocks for key in zip(KINDS, block, strict=True)], share - rest) for blocks, share in found]
    factor = max([1.0, *(_factor(took, shape, modules, share) for modules, share in networks if not _absent(modules))])
    bounds = {(kind, size): min(factor * own, took[kind, shape.full(kind)]) for (kind, size), own in took.items()}
    left = [(share - sum(bounds.get(key, 0.0) for key in modules)) / _absent(modules) for modules, share in networks if _absent(modules)]
    for kind in KINDS:
        least = min(own for (other, _), own in bounds.items() if other == kind)
        bounds[kind, 0] = min(max([0.0, *left]), least)
    return bounds


def _factor(took: Took, shape: Shape, modules: Sequence[tuple[str, int]], share: float) -> float:
    """By which the smaller ones among a network's modules take its `share` together with the whole ones."""
    smaller = sum(took[kind, size] for kind, size in modules if size < shape.full(kind))
    whole = sum(took[kind, size] for kind, size in modules if size == shape.full(kind))
    return (share - whole) / smaller if smaller else 1.0


def _absent(modules: Iterable[tuple[str, int]]) -> int:
    return sum(size == 0 for _, size in modules)


def sizes(shape: Shape, kind: str) -> list[int]:
    """The sizes that are timed, largest first: every number of groups, and a geometric ladder of widths, after ZipLM."""
    if kind == ATTENTION:
        return list(range(shape.groups, 0, -1))
    return widths(shape.width)


class Clock:
    """Times networks beside the whole one.

    One thread's time is what it computed, so that turns of other processes on the same core don't count; that of several is
    what passed.
    """

    def __init__(self, whole: Run, threads: int) -> None:
        self._run, self._times = whole, list[float]()
        self._now = time.thread_time if threads == 1 else time.perf_counter

    @property
    def whole(self) -> float:
        """Milliseconds of the whole network."""
        return statistics.median(self._times)

    def share(self, run: Run) -> float:
        """What another takes, as a share of the whole network's time. Each is run twice at its turn, the second time counts."""
        ratios, began = list[float](), self._now()
        self._took(run)
        gc.disable()
        try:
            while len(ratios) < (FEWEST if self._now() - began > LONG else ROUNDS) or self._now() - began < SECONDS:
                reference = self._took(self._run)
                self._times.append(reference)
                ratios.append(self._took(run) / reference)
        finally:
            gc.enable()
        return statistics.median(ratios)

    def _took(self, run: Run) -> float:
        """Milliseconds of a run that another has just gone before."""
        run()
        began = self._now()
        run()
        return 1e3 * (self._now() - began)


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Run on so many of the cores only, with that many threads of torch."""
    before, allowed = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        torch.set_num_threads(threads)
        if allowed is not None:
            os.sched_setaffinity(0, sorted(allowed)[-threads:])
        yield
    finally:
        if allowed is not None:
            os.sched_setaffinity(0, allowed)
        torch.set_num_threads(before)


def _new(folder: str, name: str) -> Path:
    path = Path(folder, name)
    path.mkdir()
    return path


def _require(stopwatch: Stopwatch, setting: Setting, formats: Sequence[str], threads: int, config: PretrainedConfig) -> None:
    if setting.phase == DECODE and not interface_of(config).remembers:
        raise UserError("An encoder writes no text, so it has no decode phase.", remedy="Measure prefill.")
    if reason := stopwatch.refuses(config):
        raise UserError(reason, remedy="Choose another target, such as onnxruntime.")
    if unknown := [name for name in formats if name not in stopwatch.formats]:
        raise UserError(f"{stopwatch.runtime} isn't timed in {unknown[0]}.", remedy=f"It is in: {', '.join(stopwatch.formats)}.")
    if not 1 <= threads <= cores():
        raise UserError(f"{threads} threads don't fit the {cores()} cores that may be used.", remedy="Say fewer --threads.")
    context = int(getattr(config, "max_position_embeddings", setting.sequence))
    if setting.sequence > context:
        raise UserError(f"{setting.sequence} tokens are more than the model's context of {context}.", remedy="Say a smaller --sequence.")
