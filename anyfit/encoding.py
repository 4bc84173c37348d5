"""Every variant of every matrix, block after block: what arrives at a block is seen, then its matrices are encoded.

Hidden states, second moments and variants of one block exist at a time. What is finished is on disk: a run that was
killed goes on at the block that it was in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from anyfit.calibration.collect import Moments, observed
from anyfit.calibration.spread import Spread
from anyfit.calibration.statistics import InputStatistics
from anyfit.checkpoint import Source
from anyfit.core.config import format_of
from anyfit.core.errors import ModelError, UserError
from anyfit.core.files import remove, written_aside
from anyfit.core.memory import release
from anyfit.core.space import Space
from anyfit.core.units import Weight
from anyfit.devices import matrix_speed
from anyfit.distributed import Group
from anyfit.family.store import Store, Writing
from anyfit.formats import formats
from anyfit.formats.nested import held, lowered
from anyfit.formats.table import TableFormat
from anyfit.progress import Progress, Stage
from anyfit.quantizers.base import Encoded, Quantizer
from anyfit.quantizers.inputs import with_inputs
from anyfit.quantizers.worker import Workers
from anyfit.streaming import States, Stream, batches
from anyfit.targets.base import Target

FOLDER = "calibration"
"""Of the journal: what arrives at the block that is being encoded."""
NUMBERS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 23}
"""Of a matrix, encoded together: whole rows. Fixed, so that results don't depend on the memory at hand. A graphics processor takes about
the same time for fewer."""

COMPARED = 128
"""Of so many rows of a matrix, one is also encoded in tables that aren't nested in others: the finest take twenty times as long."""

Matrices = list[Weight]
ByFormat = dict[str, Encoded]
"""A matrix, or rows of some, as variants."""
Work = tuple[str, tuple[str, ...]]
"""A format that is encoded and stored, and those that its bytes hold."""
_Pieces = list[tuple[Weight, slice]]


@dataclass(frozen=True)
class _Task:
    """Rows of a group's matrices, their numbers, what was prepared for them, how large the numbers of their inputs are, the format that
    they are encoded in, and those that its bytes hold."""

    group: Matrices
    pieces: _Pieces
    matrix: Tensor
    prepared: Any
    spread: Spread | None
    format_: str
    held: tuple[str, ...]


class Encoder(Protocol):
    """Uses up the moments of the groups' inputs, by input, and writes the variants of their matrices."""

    def encode(self, groups: list[Matrices], moments: dict[str, Moments], /) -> None: ...


@dataclass(frozen=True)
class CalibrationPass(ABC):
    """Runs the text through the network, block after block, for someone who makes variants of what inputs look like.

    `tokens` (segments, length): the calibration text, all of it. Processes run the blocks on shares of the text, and encode shares of
    the matrices.
    """

    stream: Stream
    space: Space
    store: Store
    tokens: Tensor
    progress: Progress
    group: Group

    name: ClassVar[str]

    @abstractmethod
    def encoder(self, stage: Stage) -> AbstractContextManager[Encoder]:
        """For as long as the pass lasts."""

    def run(self) -> None:
        """Write what the store doesn't have yet."""
        todo = self._todo()
        self.group.wait()
        if not todo:
            return
        weights = sum(len(group) for groups in todo.values() for group in groups)
        with self.progress.stage(self.name, weights) as stage, self.encoder(stage) as encoder:
            index, states = self._begin(todo, encoder)
            for block in range(index, max(todo) + 1):
                if block < self.stream.num_blocks:
                    states = self._block(block, states, todo.get(block, []), encoder)
                else:
                    self._after(states, todo[block], encoder)
        self.group.wait()
        if self.group.first:
            remove(self.store.folder / FOLDER)

    @property
    def _folder(self) -> Path:
        """For as many processes, as others have other shares."""
        return self.store.folder / FOLDER / f"{self.group.rank + 1}-of-{self.group.size}"

    @cached_property
    def _share(self) -> Tensor:
        """This process's part of the text, in the batches that one process would make."""
        own = self.group.share(batches(self.tokens))
        return self.tokens[own[0].start : own[-1].stop]

    def _todo(self) -> dict[int, list[Matrices]]:
        """What is missing, by where its input is seen; groups in the order of the network."""
        found: dict[int, list[Matrices]] = {}
        for group in self.groups():
            if not all(self.store.has(weight.name) for weight in group):
                found.setdefault(self.stream.seen(group[0]), []).append(group)
        return found

    def groups(self) -> list[Matrices]:
        """Neighbours that read the same input and have the same choices: encoded as one matrix, being rows of one."""
        weights = [weight for decision in self.space.decisions for weight in decision.unit.weights]
        groups = groupby(weights, key=lambda weight: (weight.input or weight.name, self.choices[weight.name]))
        return [list(group) for _, group in groups]

    @cached_property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """{weight: its formats}."""
        return {w.name: tuple(c.name for c in d.choices) for d in self.space.decisions for w in d.unit.weights}

    def rounded(self, weights: Iterable[Weight]) -> set[str]:
        """The inputs of these matrices that are rounded under one of their choices."""
        return {str(w.input) for w in weights if any(formats.get(format_of(choice)).rounds for choice in self.choices[w.name])}

    def _begin(self, todo: dict[int, list[Matrices]], encoder: Encoder) -> tuple[int, States]:
        """A block before all that is missing in the blocks, and what it reads."""
        first, before = min([index for index in todo if index >= 0], default=0), todo.get(-1, [])
        kept = self.group.gathered([index for index in range(first + 1) if self._path(index).is_file()])
        known = sorted(set.intersection(*map(set, kept)))
        if known and not any(group[0].input for group in before):
            index, moments = known[-1], {}
        else:
            index = 0
            with self._observed(before) as moments, written_aside(self._path(0)) as aside:
                self.stream.embedded(self._share, self.stream.original, aside)
        encoder.encode(before, moments)
        return index, self._states(index)

    def _block(self, index: int, states: States, groups: list[Matrices], encoder: Encoder) -> States:
        """Run a block and encode what it holds; its outputs."""
        with self._observed(groups) as moments, written_aside(self._path(index + 1)) as aside:
            into = States(aside, states.length, states.width)
            self.stream.advance(index, self._share, states, self.stream.original, into)
        release()
        encoder.encode(groups, moments)
        self.group.wait()
        remove(states.path)
        return self._states(index + 1)

    def _after(self, states: States, groups: list[Matrices], encoder: Encoder) -> None:
        stream = self.stream
        with self._observed(groups) as moments, stream.head(stream.original, logits=False) as run, torch.no_grad():
            for segments in batches(self._share):
                run(states.read(segments))
        encoder.encode(groups, moments)
        self.group.wait()

    def owners(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The process that takes each of these pieces of work, the largest shared out first."""
        loads, owners = [0] * self.group.size, {}
        for key in sorted(sizes, key=lambda key: -sizes[key]):
            owners[key] = loads.index(min(loads))
            loads[owners[key]] += sizes[key]
        return owners

    def statistics(self, sizes: Mapping[str, int], moments: dict[str, Moments]) -> Iterator[tuple[str, InputStatistics | None]]:
        """Of each input all processes' moments, which are used up; None for a process whose work it isn't. `sizes`: of the
        work, by input."""
        owners = self.owners(sizes)
        for name in sizes:
            seen = moments.pop(name)
            seen.add_up(self.group, owners[name])
            yield name, seen.statistics(name) if owners[name] == self.group.rank else None
            release()

    @contextmanager
    def _observed(self, groups: list[Matrices]) -> Iterator[dict[str, Moments]]:
        weights = [weight for group in groups for weight in group]
        seen = observed(self.stream.model, self.stream.architecture, weights, self.group, self.rounded(weights))
        with seen as moments, matrix_speed(self.stream.device):
            yield moments

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.states"

    def _states(self, index: int) -> States:
        path, width = self._path(index), self.stream.model.config.hidden_size
        return States(path, path.stat().st_size // (4 * len(self._share) * width), width)


@dataclass(frozen=True)
class Encoding(CalibrationPass):
    """One run's encoding: every matrix in every format that is a choice for it. `nested`: matrices of whose integers the finest are stored
    alone."""

    target: Target
    source: Source
    quantizer: Quantizer
    nested: frozenset[str]

    name = "calibrate and encode"

    @contextmanager
    def encoder(self, stage: Stage) -> Iterator[Encoder]:
        with Workers(self.stream.device) as workers:
            yield _Worker(self, workers, stage)

    def rows(self, weight: Weight, which: slice) -> Tensor:
        """Of a matrix (outputs, inputs), float32: rows in the target's order."""
        stored = self.stream.stored.read(weight.name)
        stored = stored.T if weight.transposed else stored
        order = self._orders.get(weight.name)
        return (stored[which] if order is None else stored[order[which]]).float().contiguous()

    def works(self, weight: Weight) -> list[Work]:
        return works(self.choices[weight.name], weight.name in self.nested)

    @cached_property
    def _orders(self) -> dict[str, Tensor]:
        source, weights = self.source, [weight for decision in self.space.decisions for weight in decision.unit.weights]
        orders = {weight.name: self.target.row_order(source, weight) for weight in weights}
        return {name: order for name, order in orders.items() if order is not None}


@dataclass(frozen=True)
class _Worker:
    """Encodes what it is given, pieces side by side."""

    encoding: Encoding
    workers: Workers
    stage: Stage

    def encode(self, groups: list[Matrices], moments: dict[str, Moments]) -> None:
        """Uses up the moments. Each process encodes what reads some of the inputs, the largest shared out first.

        What reads an input is prepared while the last pieces of the one before are still being encoded; the widest first, as
        preparing it takes the most memory.
        """
        results = self.workers.map(self._variant, self._tasks(groups, moments))
        for _, own in groupby(results, key=lambda result: id(result[0].group)):
            self._write(own)
        release()

    def _tasks(self, groups: list[Matrices], moments: dict[str, Moments]) -> Iterator[_Task]:
        readers: dict[str, list[Matrices]] = {}
        for group in groups:
            readers.setdefault(group[0].input or group[0].name, []).append(group)
        owners = self.encoding.owners({key: sum(w.num_weights for group in own for w in group) for key, own in readers.items()})
        for key in sorted(readers, key=lambda key: -readers[key][0][0].shape[1]):
            seen, own = moments.pop(key, None), readers[key]
            if seen:
                seen.add_up(self.encoding.group, owners[key])
            if owners[key] != self.encoding.group.rank:
                self.stage.advance(sum(map(len, own)))
                continue
            statistics = seen.statistics(key) if seen else InputStatistics.unknown(own[0][0].shape[1])
            del seen
            names = dict.fromkeys(name for group in own for name in self.encoding.choices[group[0].name])
            prepared, spread = self.encoding.quantizer.prepare(statistics, [formats.get(name) for name in names]), statistics.spread
            del statistics
            release()
            for group in own:
                yield from self._of_group(group, prepared, spread)
            del prepared

    def _of_group(self, group: Matrices, prepared: Any, spread: Spread | None) -> Iterator[_Task]:
        of_rows, of_matrices = list[Work](), list[Work]()
        for work in self.encoding.works(group[0]):
            (of_matrices if formats.get(work[0]).whole else of_rows).append(work)
        yield from self._pieces(group, of_rows, prepared, spread)
        for weight in group:
            matrix = self.encoding.rows(weight, slice(None)) if of_matrices else torch.empty(0)
            yield from (_Task(group, [(weight, slice(0, weight.shape[0]))], matrix, prepared, spread, *work) for work in of_matrices)

    def _pieces(self, group: Matrices, works: list[Work], prepared: Any, spread: Spread | None) -> Iterator[_Task]:
        for pieces in _pieces(group, NUMBERS_AT_ONCE[self.encoding.stream.device.type]) if works else ():
            # Numbers of a column lie side by side, as the quantizer takes them.
            matrix = torch.cat([self.encoding.rows(weight, rows) for weight, rows in pieces]).T.contiguous().T
            yield from (_Task(group, pieces, matrix, prepared, spread, *work) for work in works)

    def _write(self, results: Iterator[tuple[_Task, ByFormat]]) -> None:
        """The variants of one group, whose pieces come in order."""
        with ExitStack() as stack:
            files: dict[str, Writing] = {}
            for task, encoded in results:
                files = files or {weight.name: stack.enter_context(self._writing(weight)) for weight in task.group}
                first_row = 0
                for weight, rows in task.pieces:
                    part = slice(first_row, first_row + rows.stop - rows.start)
                    for name, of_all in encoded.items():
                        own = of_all.rows(part) if len(task.pieces) > 1 else of_all
                        if name in task.held:
                            files[weight.name].derive(name, task.format_, own)
                        else:
                            files[weight.name].put(name, rows.start, own)
                    first_row = part.stop
        for name in files:
            self.stage.advance(detail=name)

    def _writing(self, weight: Weight) -> AbstractContextManager[Writing]:
        stored = {name: formats.get(name) for name, _ in self.encoding.works(weight)}
        shapes = {name: (format_.data_rows(weight.shape), format_.row_bytes(weight.shape[1])) for name, format_ in stored.items()}
        return self.encoding.store.writing(weight.name, shapes)

    def _variant(self, task: _Task) -> tuple[_Task, ByFormat]:
        try:
            found = variants(self.encoding.quantizer, task.matrix, task.prepared, task.format_, task.held)
            return task, {name: with_inputs(formats.get(name), encoded, task.spread) for name, encoded in found.items()}
        except UserError as error:
            rest = ",".join(other for other in self.encoding.choices[task.group[0].name] if other != task.format_)
            listed = ", ".join(weight.name for weight in task.group)
            raise ModelError(
                f"{listed} can't be stored as {task.format_}: {error.problem}", remedy=f"Leave it out: --formats {rest}."
            ) from error


def works(names: Iterable[str], integers: bool = False) -> list[Work]:
    """What is to be encoded and stored, so that a matrix is there in all these formats. Names of other choices stand for themselves.
    `integers`: see `held`."""
    names = list(names)
    within = held(names, integers)
    return [(name, tuple(low for low in names if within.get(low) == name)) for name in names if name not in within]


def variants(quantizer: Quantizer, matrix: Tensor, prepared: Any, name: str, within: Iterable[str]) -> ByFormat:
    """A matrix (rows, columns) in a format, and in those that its bytes hold."""
    high = quantizer.encode(matrix, prepared, formats.get(name))
    found = {name: high}
    for low in within:
        data = lowered(formats.get(name), formats.get(low), high.data)
        found[low] = Encoded(data, quantizer.errors(matrix.cpu() - formats.get(low).decode(data), prepared), high.notes)
    if isinstance(formats.get(name), TableFormat) and within:
        some, importance = matrix[::COMPARED].cpu(), quantizer.statistics(prepared).diagonal.cpu()
        parts = {own: _part(some, importance, own, made.data[::COMPARED]) for own, made in found.items()}
        found = {own: replace(made, alone=made.errors * parts[own]) for own, made in found.items()}
    return found


def _part(rows: Tensor, importance: Tensor, name: str, nested: Tensor) -> float:
    """What tables of one size alone lose of some rows, as a part of what the `nested` ones do. Column by column, as both are chosen: what
    columns lose together differs so much from row to row that some rows wouldn't stand for all."""
    format_ = formats.get(name)
    assert isinstance(format_, TableFormat)
    both = [format_.alone.encode(rows, importance), nested]
    alone, own = (float((importance * (rows - format_.decode(data)).square()).sum()) for data in both)
    return alone / own if own else 1.0


def _pieces(group: Matrices, numbers: int) -> Iterator[_Pieces]:
    """Rows of the group's matrices that are encoded together: whole ones, up to so many numbers."""
    most = max(1, numbers // group[0].shape[1])
    pieces: _Pieces = []
    room = most
    for weight in group:
        start = 0
        while start < weight.shape[0]:
            rows = slice(start, min(weight.shape[0], start + room))
            pieces.append((weight, rows))
            start, room = rows.stop, room - (rows.stop - rows.start)
            if not room:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces
