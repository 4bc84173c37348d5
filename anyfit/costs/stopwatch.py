"""Timing: the contract of a runtime's stopwatch, and how a table of latencies is measured with one."""

from __future__ import annotations

import gc
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import PretrainedConfig, PreTrainedModel

from anyfit.core import memory
from anyfit.core.errors import UserError
from anyfit.costs.latency import ATTENTION, DECODE, FEED_FORWARD, KINDS, Device, LatencyTable, Setting, Shape, cores, parts
from anyfit.costs.probes import shape_of, sized
from anyfit.interface import interface_of
from anyfit.progress import Progress, Silent, Stage
from anyfit.structure.levels import widths

Run = Callable[[], object]
"""One run of a network that is ready."""
Took = Mapping[tuple[str, int], float]
"""Of modules, by kind and size, as shares of the whole network's time."""
Blocks = tuple[tuple[int, int], ...]
"""Of a network: groups of each one's attention, width of its feed-forward."""

COPIES = 2
"""Of each network, the fastest of which counts: where in memory its numbers come to lie is chance, and may slow it down by a fifth."""
LIKELY = 0.9
"""Of pairs of copies, those that differ by no more than budgets count on."""
SECONDS, ROUNDS = 1.0, 21
"""How long a copy is timed beside the whole, by the clock that counts, and in how many rounds at least."""
LONG, FEWEST = 4.0, 5
"""No longer than this, though, if that takes no fewer rounds than these."""
HELD, OF_FREE, ALIVE = 2**32, 0.25, 512
"""What bounds the networks that are held at once to take turns, whichever comes first: bytes of their numbers in float32, the share of free
memory and disk that they have taken, and threads."""
WARMING, WARMED = 0.01, 4
"""How a network is warmed up at its turn: run for so many seconds, but once at least and so many times at most. Until the caches have taken
it in again it is slower than the whole one, which has a turn so much more often."""
MIXED, VARIED = 12, 0.3
"""Networks of mixed sizes: how many, and the standard deviation of sizes within one, as a share of the whole."""
DENSITIES, LEFT_OUT = (0.1, 0.9), (0.0, 0.1, 0.25)
"""Of mixed networks: from where to where mean sizes go, as shares of the whole, and the shares of modules that are left out, by turns."""
NOISE, ROUGHNESSES, EXACT = 0.02, (0.01, 0.03, 0.1, 0.3), 1e-4
"""Standard deviations: of a network's time from what its modules add up to, as a share of it; of a module's from the line between its
neighbours' in size, one of these, and of the whole network's time, as shares of an even part of that."""


class Stopwatch(ABC):
    """What makes networks ready to be timed in one runtime. `runtime` is its name and version."""

    runtime: str
    formats: tuple[str, ...]
    """Those that run at a speed of their own, the plainest first."""

    def refuses(self, config: PretrainedConfig) -> str | None:
        """Why it can't time modules of a network of this config; None where it can."""
        return None

    def last(self, setting: Setting) -> float:
        """The share of its time that the feed-forward of the last block takes: `costs.latency.parts`."""
        return 1.0

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
    slows the machine down for a while slows down both. As it slows down large ones more, and for minutes, all networks take turns, as far
    as memory allows. Of `COPIES` of each, and one more of the whole one, the fastest counts. The whole network in any format but the first
    is timed beside that in the first.

    Budgets count on the slower copy, as what someone runs is one, and chance which: by the difference that nine of ten pairs keep to.

    Networks with modules of one kind at one size, all else whole, and networks of mixed sizes are timed. What modules take is then what
    explains all of these best, see `_fitted`, as differences between single networks neither add up nor are free of noise. Of the whole
    network's time what isn't its modules' is the rest.
    Raises `UserError` for what can't be timed.
    """
    threads, formats = threads or cores(), list(dict.fromkeys(formats or stopwatch.formats[:1]))
    _require(stopwatch, setting, formats, threads, config)
    shape = shape_of(config, trust_remote_code=trust_remote_code)
    setting = replace(setting, sequence=interface_of(config).length(config) or setting.sequence)
    whole: dict[str, float] = {}
    modules: dict[tuple[str, int, str], float] = {}
    margins: dict[str, float] = {}
    networks, maker = _networks(shape), _Maker(stopwatch, config, setting, threads, trust_remote_code)
    last = stopwatch.last(setting)
    with pinned(threads), (progress or Silent()).stage("measure", COPIES * len(formats) * len(networks)) as stage:
        for name in formats:
            milliseconds, shares, slower = _timed(networks, shape, maker, name, stage)
            whole[name] = whole[formats[0]] * _slower(shape, maker, name, formats[0]) if whole else milliseconds
            took, longer = _fitted(shares, shape, last)
            margins[name] = longer * slower
            modules |= {(*key, name): own * whole[name] for key, own in took.items()}
    return LatencyTable(target, Device.here(stopwatch.runtime, threads), setting, shape, whole, modules, margins, last)


@dataclass(frozen=True)
class _Maker:
    """Makes networks of one config ready to be timed."""

    stopwatch: Stopwatch
    config: PretrainedConfig
    setting: Setting
    threads: int
    trust_remote_code: bool

    def ready(self, blocks: Iterable[tuple[int, int]], format_: str, folder: Path) -> tuple[Run, int]:
        """And the bytes of its numbers in float32. It has run once, so that it holds all that it will hold."""
        model = sized(self.config, list(blocks), trust_remote_code=self.trust_remote_code)
        num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
        run = self.stopwatch.ready(model, format_, self.setting, self.threads, folder)
        run()
        return run, num_bytes


def _timed(
    networks: Mapping[Blocks, str], shape: Shape, maker: _Maker, format_: str, stage: Stage
) -> tuple[float, dict[Blocks, float], float]:
    """Milliseconds of the whole network; what the others take, as shares of that; and how many times as long as the faster of two copies
    the slower one takes, in nine of ten pairs at most."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(maker.ready(shape.uncut, format_, _new(folder, "whole"))[0], maker.threads)
        copies = _shares(clock, networks, maker, format_, stage)
    fastest = min(1.0, *copies.pop(tuple(shape.uncut)))
    slower = float(np.quantile([max(own) / min(own) for own in copies.values()], LIKELY))
    return fastest * clock.whole, {blocks: min(own) / fastest for blocks, own in copies.items()}, slower


def _shares(clock: Clock, networks: Mapping[Blocks, str], maker: _Maker, format_: str, stage: Stage) -> dict[Blocks, list[float]]:
    """What the copies of each network take as shares of the clock's, as many as may be held taking turns."""
    shares, left = {blocks: list[float]() for blocks in networks}, COPIES * list(networks)
    random.Random(0).shuffle(left)  # those that don't fit at once shouldn't differ from others in kind
    while left:
        with tempfile.TemporaryDirectory() as folder:
            runs, names, held = list[Run](), list[Blocks](), 0
            memory.release()
            before = _free(folder)
            while left and not (runs and (held >= HELD or len(runs) * maker.threads >= ALIVE or _crowded(before, folder))):
                blocks = left.pop()
                run, num_bytes = maker.ready(blocks, format_, _new(folder, str(len(runs))))
                runs.append(run)
                names.append(blocks)
                held += num_bytes
                stage.advance(0, f"{len(runs)} ready to take turns, {format_}: {networks[blocks]}")
            taken = clock.shares(runs, partial(stage.advance, detail=f"{len(runs)} taking turns, {format_}"))
            for blocks, share in zip(names, taken, strict=True):
                shares[blocks].append(share)
            del run, runs  # before the next are made
    return shares


def _slower(shape: Shape, maker: _Maker, format_: str, plain: str) -> float:
    """How many times as long the whole network takes in a format as in another."""
    names = [name for name in (plain, format_) for _ in range(COPIES)]
    with tempfile.TemporaryDirectory() as folder:
        first, *others = (maker.ready(shape.uncut, name, _new(folder, str(index)))[0] for index, name in enumerate(names))
        shares = [1.0, *Clock(first, maker.threads).shares(others)]
    return min(shares[COPIES:]) / min(shares[:COPIES])


def _networks(shape: Shape) -> dict[Blocks, str]:
    """Those that are timed beside a whole one, and what is said of each."""
    found = {tuple(shape.uncut): "whole"}
    for kind in KINDS:
        for size in (*sizes(shape, kind)[1:], 0):
            found[((size, shape.width) if kind == ATTENTION else (shape.groups, size),) * shape.blocks] = f"{kind} {size}"
    return found | dict.fromkeys(_mixed(shape), "mixed sizes")


def _mixed(shape: Shape) -> list[Blocks]:
    """Networks of mixed sizes, from small to large ones, the same in every run."""
    rng, ladder = random.Random(0), {kind: sizes(shape, kind) for kind in KINDS}

    def drawn(kind: str, density: float, left_out: float) -> int:
        wanted, out = rng.gauss(density, VARIED) * shape.full(kind), rng.random() < left_out
        return 0 if out else min(ladder[kind], key=lambda size: abs(size - wanted))

    found, (least, most) = dict[Blocks, None](), DENSITIES
    for number in range(MIXED):
        density, left_out = least + (most - least) * number / (MIXED - 1), LEFT_OUT[number % len(LEFT_OUT)]
        found[tuple((drawn(ATTENTION, density, left_out), drawn(FEED_FORWARD, density, left_out)) for _ in range(shape.blocks))] = None
    return [blocks for blocks in found if blocks != tuple(shape.uncut)]


def _fitted(shares: Mapping[Blocks, float], shape: Shape, last: float) -> tuple[Took, float]:
    """What modules take, from the `shares` of the whole network's time that networks take, and how many times that they may take.

    How even sizes are is what predicts those of mixed sizes best, each from all others. As modules don't quite add up, and as searches take
    what seems fast by chance, the second is by how much one of mixed sizes at most takes longer than is predicted. That bounds networks
    only where smaller modules take most of their time.
    """
    misses = {roughness: _misses(shares, shape, last, roughness) for roughness in ROUGHNESSES}
    best = min(misses, key=lambda roughness: sum(own**2 for own in misses[roughness]))
    return _explaining(shares, shape, last, best), 1 + max((0.0, *misses[best]))


def _misses(shares: Mapping[Blocks, float], shape: Shape, last: float, roughness: float) -> list[float]:
    """By which share each network of mixed sizes takes longer than is predicted from all others."""
    found = []
    for blocks in _mixed(shape):
        others = _explaining({own: share for own, share in shares.items() if own != blocks}, shape, last, roughness)
        whole, modules = (sum(share * others[kind, size] for kind, size, share in parts(own, last)) for own in (shape.uncut, blocks))
        found.append(shares[blocks] / (1 - whole + modules) - 1)
    return found


def _explaining(shares: Mapping[Blocks, float], shape: Shape, last: float, roughness: float) -> Took:
    """What modules take: the least squares of what networks take from the rest and the sum of their modules, none of them below zero, where
    sizes are in line but for `roughness`.

    So a module is known from all networks, and from its neighbours. Smaller ones may take longer: runtimes compute some sizes faster than
    others. What blocks take without any module is in the rest, as it can't be told from that: all networks have as many blocks.
    """
    ladder = {kind: sizes(shape, kind)[::-1] for kind in KINDS}
    keys = [(kind, size) for kind in KINDS for size in ladder[kind]]
    *columns, rest = np.eye(len(keys) + 1)  # of the unknowns: what each module takes, and the rest
    of, even = dict(zip(keys, columns, strict=True)), 1 / (len(KINDS) * shape.blocks)

    def network(blocks: Sequence[tuple[int, int]]) -> np.ndarray:
        return rest + sum(share * of[kind, size] for kind, size, share in parts(blocks, last))

    rows = [(network(shape.uncut), 1.0, EXACT * even)]
    rows += [(network(blocks), share, NOISE * share) for blocks, share in shares.items()]
    for kind, some in ladder.items():
        for below, size, above in zip(some, some[1:], some[2:], strict=False):
            between = (size - below) / (above - below)
            line = (1 - between) * of[kind, below] + between * of[kind, above]
            rows.append((of[kind, size] - line, 0.0, roughness * even))
    matrix, values, deviations = map(np.array, zip(*rows, strict=True))
    found, _ = nnls(matrix / deviations[:, None], values / deviations, maxiter=100 * len(keys))
    return dict(zip(keys, found.tolist(), strict=False))


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

    def shares(self, runs: Sequence[Run], told: Callable[[], None] = lambda: None) -> list[float]:
        """What others take, as shares of the whole network's time: medians over rounds, in each of which all of them take turns, each with
        the whole one before it, in another order each time, as other work on the machine may come and go as often as rounds do. Each is
        warmed up at its turn, and its last run counts. `told`: called once for each of them, by and by."""
        ratios, said, began = [list[float]() for _ in runs], 0, self._now()
        rng, turns = random.Random(0), list(zip(runs, ratios, strict=True))
        gc.disable()
        try:
            done, number = 0, 1
            while done < number:
                rng.shuffle(turns)
                for run, own in turns:
                    reference = self._took(self._run)
                    self._times.append(reference)
                    own.append(self._took(run) / reference)
                done += 1
                number = max(done, _rounds((self._now() - began) / done / len(runs)))
                while said < len(runs) * done // number:
                    told()
                    said += 1
        finally:
            gc.enable()
        return [statistics.median(own) for own in ratios]

    def _took(self, run: Run) -> float:
        """Milliseconds of a run that others of the same have just gone before."""
        began = self._now()
        for _ in range(WARMED):
            run()
            if self._now() - began >= WARMING:
                break
        began = self._now()
        run()
        return 1e3 * (self._now() - began)


def _free(folder: str) -> list[int]:
    """Bytes of memory, where the system says, and of disk."""
    found = memory.free()
    return [shutil.disk_usage(folder).free] + ([] if found is None else [found])


def _crowded(before: Sequence[int], folder: str) -> bool:
    return any(now < (1 - OF_FREE) * own for now, own in zip(_free(folder), before, strict=True))


def _rounds(seconds: float) -> int:
    """How many there are, where a network takes so many seconds in each."""
    wanted = max(ROUNDS, SECONDS / seconds)
    return math.ceil(wanted if wanted * seconds <= LONG else max(FEWEST, LONG / seconds))


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
