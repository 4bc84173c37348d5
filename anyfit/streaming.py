"""A network that runs block after block, with the numbers of one block in memory, whatever its size.

All segments of a text go through a block before the next one is read. Between blocks their hidden states lie in a file.
So a network larger than memory is read once for each pass over a text.

The network's own class computes everything: for a block, its forward is run with every other block passing on what it
gets, and stops when the block has answered. Masks, positions and whatever else a class gives its blocks are therefore what
it always gives them. Looking up tokens reads the rows of these tokens; the head multiplies some rows at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.activations import Rounding, round_inputs
from anyfit.architectures.base import Architecture
from anyfit.core.memory import release
from anyfit.core.units import Weight
from anyfit.devices import CPU
from anyfit.interface import interface_of

TOKENS_AT_ONCE = 1024
"""Of whole segments, at least one. Fixed, so that results don't depend on the memory at hand."""
PICTURES_AT_ONCE = 8
"""Of some hundred patches each; fixed, too."""
ROWS_AT_ONCE = 4096
"""Of the embedding or the head, read together."""
RELEASED = 1 << 22
"""Numbers: a block of more gives its memory back to the system, which takes some milliseconds."""


class Numbers(Protocol):
    """Where the decided matrices come from, in the checkpoint's orientation and in any floating-point type."""

    def matrix(self, weight: Weight) -> Tensor:
        """All of it."""

    def rows(self, weight: Weight, which: Tensor | slice) -> Tensor:
        """Some rows of the embedding or the head."""

    def inputs(self, weight: Weight) -> Rounding | None:
        """How what it multiplies is rounded first; None where it isn't. Never of the embedding or the head."""


class Stored(Protocol):
    """A network on disk: a `checkpoint.Checkpoint`, or a `checkpoint.Source`, which lacks the decided matrices."""

    def frame(self) -> PreTrainedModel:
        """Its parameters on the meta device, its buffers real."""

    def skeleton(self) -> PreTrainedModel:
        """On the meta device, ties in place."""

    def tensors(self) -> Mapping[str, tuple[torch.Size, torch.dtype]]:
        """What is stored, buffers included."""

    def read(self, name: str) -> Tensor:
        """One tensor in its stored type and orientation."""


@dataclass(frozen=True)
class Original:
    """What is stored."""

    stored: Stored

    def matrix(self, weight: Weight) -> Tensor:
        return self.stored.read(weight.name)

    def rows(self, weight: Weight, which: Tensor | slice) -> Tensor:
        return self.stored.read(weight.name)[which].float()

    def inputs(self, weight: Weight) -> Rounding | None:
        return None


class States:
    """What segments are between two blocks: (segments, length, width) float32 in a file.

    Read and written, never mapped: mapped pages would count as memory.
    """

    def __init__(self, path: Path, length: int, width: int) -> None:
        self.path, self.length, self.width = path, length, width
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def read(self, segments: slice) -> Tensor:
        size = self.length * self.width
        values = np.fromfile(self.path, np.float32, (segments.stop - segments.start) * size, offset=4 * segments.start * size)
        return torch.from_numpy(values).view(-1, self.length, self.width)

    def write(self, segments: slice, values: Tensor) -> None:
        assert values.shape[1:] == (self.length, self.width), values.shape
        with self.path.open("r+b") as file:
            file.seek(4 * segments.start * self.length * self.width)
            values.detach().float().cpu().contiguous().numpy().tofile(file)


def num_batches(segments: int, length: int) -> int:
    """How many `batches` make for so many segments of tokens."""
    return -(-segments // max(1, TOKENS_AT_ONCE // length))


def batches(tokens: Tensor) -> list[slice]:
    """Segments that go through a block together, for tokens (segments, length) or pictures."""
    at_once = max(1, TOKENS_AT_ONCE // tokens.shape[1]) if tokens.ndim == 2 else PICTURES_AT_ONCE
    return [slice(start, min(start + at_once, len(tokens))) for start in range(0, len(tokens), at_once)]


@dataclass
class _Job:
    """What one run of the network's forward is for.

    `block`: the one that answers; the number of blocks means what comes after them. `hidden`: what it reads; None asks for
    what the first block would read. `numbers`: those of the embedding and the head, where they are needed. `logits`: whether
    the head multiplies, or answers with what it reads. `whole`: answer with all that the block returns.
    """

    block: int
    hidden: Tensor | None = None
    numbers: Numbers | None = None
    logits: bool = True
    whole: bool = False


class _Answer(Exception):  # noqa: N818 (it ends a run early, nothing is wrong)
    def __init__(self, value: Any) -> None:
        self.value = value


class Stream:
    """One network, run by whoever calls, on a `device`. `folder` takes the hidden states; `original`: its decided matrices, where
    they aren't stored.

    `model` is of the network's class. Its parameters are on the meta device while nothing runs, so hooks can be put on its
    modules as on any other. What goes in may be anywhere; what comes out is on the device.
    """

    def __init__(
        self,
        stored: Stored,
        architecture: Architecture,
        folder: Path,
        original: Numbers | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.stored, self.architecture, self.folder, self.device = stored, architecture, folder, device
        self.model: PreTrainedModel = stored.frame()
        self.interface = interface_of(self.model.config)
        self.original = original or Original(stored)
        self.num_blocks = architecture.num_blocks(self.model)
        weights = list(architecture.weights(stored.skeleton()))  # the frame's own parameters are not tied
        self._decided = {weight.name: weight for weight in weights}
        self._tables = {weight.role: weight for weight in weights if weight.role in ("embedding", "head")}
        self._job: _Job | None = None
        self._in_tuples: bool | None = None
        self._num_states = 0
        self._place_hooks()
        prefixes = [architecture.block.format(i=index) + "." for index in range(self.num_blocks)]
        names = [name for name, _ in self.model.named_parameters()]
        self._names = [[name for name in names if name.startswith(prefix)] for prefix in prefixes]
        inside = {name for block in self._names for name in block}
        tables = {name for weight in self._tables.values() for name in (weight.name, *weight.tied)}
        outside = [name for name in names if name not in inside and name not in tables]
        self._projections = [name for name in outside if name in self._decided]
        self._fill([name for name in outside if name not in self._decided], self.original)
        present = stored.tensors()
        for name, buffer in self.model.named_buffers():
            if name in present:
                buffer.copy_(stored.read(name))
            buffer.data = buffer.to(device)

    # What runs.

    @contextmanager
    def embedding(self, numbers: Numbers) -> Iterator[Callable[[Tensor], Tensor]]:
        """What comes before the blocks: tokens (segments, length) to what the first block reads, (segments, length, width)."""
        with self._outer(numbers):
            yield lambda tokens: self._run(tokens, _Job(0, numbers=numbers))

    @torch.no_grad()
    def embedded(self, tokens: Tensor, numbers: Numbers, path: Path | None = None) -> States:
        """What the first block reads for tokens (segments, length); at `path`, where it stays, if that is given."""
        found: States | None = None
        with self.embedding(numbers) as run:
            for segments in batches(tokens):
                hidden = run(tokens[segments])
                found = found or (States(path, *hidden.shape[1:]) if path else self.states(*hidden.shape[1:]))
                found.write(segments, hidden)
        assert found is not None, "no text"
        return found

    @torch.no_grad()
    def advance(self, index: int, tokens: Tensor, states: States, numbers: Numbers, into: States | None = None) -> None:
        """Run a block on all segments: from its inputs to its outputs, in place unless `into` is given."""
        with self.block(index, numbers) as run:
            for segments in batches(tokens):
                (into or states).write(segments, run(tokens[segments], states.read(segments)))

    @contextmanager
    def block(self, index: int, numbers: Numbers) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """A block with its numbers in place: (tokens, hidden states) to hidden states, (segments, length, width)."""
        if index:
            self._know_blocks()
        # The projections outside run too, on their way to the block.
        with self._outer(numbers), self._filled(self.names(index), numbers):
            yield lambda tokens, hidden: self._run(tokens, _Job(index, hidden))

    def final(self, tokens: Tensor, numbers: Numbers, states: States | None = None, first: int = 0) -> States:
        """What the last block makes of tokens; from the inputs of block `first` where they are known, which stay as they are."""
        if states is None:
            states = self.embedded(tokens, numbers)
        elif first < self.num_blocks:
            begun = self.states(states.length, states.width)
            self.advance(first, tokens, states, numbers, begun)
            states, first = begun, first + 1
        for index in range(first, self.num_blocks):
            self.advance(index, tokens, states, numbers)
        return states

    def trace(self, tokens: Tensor, numbers: Numbers) -> list[States]:
        """The inputs of every block, and the last one's outputs."""
        found = [self.embedded(tokens, numbers)]
        for index in range(self.num_blocks):
            found.append(self.states(found[-1].length, found[-1].width))
            self.advance(index, tokens, found[-2], numbers, found[-1])
        return found

    def predictions(self, tokens: Tensor, numbers: Numbers, states: States | None = None) -> Predictions:
        """What comes out for these tokens, (segments, length); `states` are the last block's outputs if they are known."""
        return Predictions(self, tokens, states or self.final(tokens, numbers), numbers)

    @contextmanager
    def head(self, numbers: Numbers, *, logits: bool = True) -> Iterator[Callable[[Tensor], Tensor]]:
        """What comes after the blocks: the last one's outputs, (segments, length, width), to what the network answers, or to what the head
        reads."""
        self._know_blocks()
        with self._outer(numbers):
            yield lambda hidden: self._run(self._example(*hidden.shape[:2]), _Job(self.num_blocks, hidden, numbers, logits=logits))

    def _example(self, segments: int, length: int) -> Tensor:
        return self.interface.example(self.model.config, segments, length)

    def states(self, length: int, width: int) -> States:
        """A new file of hidden states, which goes with the object."""
        self._num_states += 1
        states = States(self.folder / f"{self._num_states}.states", length, width)
        weakref.finalize(states, states.path.unlink, missing_ok=True)
        return states

    def names(self, index: int) -> list[str]:
        """The parameters of a block."""
        return self._names[index]

    def first(self, weight: Weight) -> int:
        """The first block whose outputs depend on a matrix; -1 for what comes before them, their number for what comes after."""
        if weight.block is not None:
            return weight.block
        return self.num_blocks if weight.role in ("head", *self.architecture.after) else -1

    def seen(self, weight: Weight) -> int:
        """Where a matrix's input is seen, in the same numbers: that of an embedding which is the head too, after the blocks."""
        return self.num_blocks if weight.role == "embedding" and weight.input is not None else self.first(weight)

    # How the network's own forward is made to do it.

    def _run(self, tokens: Tensor, job: _Job) -> Tensor:
        self._job = job
        if job.hidden is not None:
            job.hidden = job.hidden.to(self.device)
        try:
            output = self.interface(self.model, tokens.to(self.device))
        except _Answer as answer:
            return answer.value
        finally:
            self._job = None
        assert job.block == self.num_blocks, f"block {job.block} was not run"
        return output

    @contextmanager
    def _filled(self, names: Sequence[str], numbers: Numbers) -> Iterator[None]:
        self._fill(names, numbers)
        large = sum(self.model.get_parameter(name).numel() for name in names) > RELEASED
        try:
            yield
        finally:
            for name in names:
                self._clear(name)
            if large:
                release()

    def _outer(self, numbers: Numbers) -> AbstractContextManager[None]:
        """The projections outside the blocks, in place."""
        return self._filled(self._projections, numbers)

    def _fill(self, names: Iterable[str], numbers: Numbers) -> None:
        for name in names:
            weight = self._decided.get(name)
            values = numbers.matrix(weight) if weight else self.stored.read(name)
            self._put(name, values.to(self.device).float())
            if weight:
                round_inputs(self.model.get_submodule(name.rpartition(".")[0]), numbers.inputs(weight))

    def _put(self, name: str, values: Tensor) -> None:
        module, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(module), attribute, nn.Parameter(values, requires_grad=False))

    def _clear(self, name: str) -> None:
        self._put(name, torch.empty(0, device="meta"))

    def _place_hooks(self) -> None:
        for index in range(self.num_blocks):
            block = self.model.get_submodule(self.architecture.block.format(i=index))
            block.forward = partial(self._turn, index, block.forward)
        if self.architecture.embedding is not None:
            embedding = self.model.get_submodule(self.architecture.embedding)
            embedding.forward = partial(self._look_up, embedding, embedding.forward)
        if self.architecture.head is not None:
            head = self.model.get_submodule(self.architecture.head)
            head.forward = partial(self._multiply, head)

    def _turn(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's forward: it passes on what it gets, or answers."""
        job = self._job
        assert job is not None
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        if index < job.block:
            last = index == self.num_blocks - 1
            passed = job.hidden if last else hidden
            return (passed,) if self._in_tuples else passed
        if job.hidden is None:
            raise _Answer(hidden)
        output = forward(job.hidden, *args, **kwargs)
        raise _Answer(output[0] if isinstance(output, tuple) and not job.whole else output)

    def _know_blocks(self) -> None:
        """See whether blocks of this class answer in tuples, so that others can pass on as they do: ask the first, with one token."""
        if self._in_tuples is not None:
            return
        token = self._example(1, 1)
        with torch.no_grad(), self.embedding(self.original) as embed:
            hidden = embed(token)
        with torch.no_grad(), self.block(0, self.original):
            self._in_tuples = isinstance(self._run(token, _Job(0, hidden, whole=True)), tuple)

    def _look_up(self, embedding: Any, forward: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """The embedding's forward over a table of the tokens at hand; zeros where nobody reads the answer."""
        job = self._job
        assert job is not None
        weight = self._tables["embedding"]
        if job.numbers is None or job.block == self.num_blocks:
            return torch.zeros(*tokens.shape, weight.shape[1], device=self.device)
        used, places = tokens.unique(return_inverse=True)
        padding, embedding.padding_idx = embedding.padding_idx, None
        try:
            self._put(weight.name, job.numbers.rows(weight, used.cpu()).to(self.device))
            found = forward(places)
            return found.requires_grad_() if torch.is_grad_enabled() else found
        finally:
            embedding.padding_idx = padding
            self._clear(weight.name)

    def _multiply(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """The head's forward, some rows at a time."""
        job = self._job
        assert job is not None and job.numbers is not None
        if not job.logits:
            raise _Answer(hidden)
        weight, numbers = self._tables.get("head", self._tables["embedding"]), job.numbers
        logits = cast(Tensor, _Product.apply(hidden, weight.shape[0], lambda which: numbers.rows(weight, which).to(hidden.device)))
        bias = getattr(head, "bias", None)
        return logits if bias is None else logits + bias


class _Product(torch.autograd.Function):
    """Times a matrix that is read some rows at a time, on the way back once more: hidden (..., inputs) to (..., outputs)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, num_rows: int, read: Callable[[slice], Tensor]) -> Tensor:
        ctx.num_rows, ctx.read = num_rows, read
        found = hidden.new_empty(*hidden.shape[:-1], num_rows)
        for rows in some_rows(num_rows):
            found[..., rows] = nn.functional.linear(hidden, read(rows))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        parts = (gradient[..., rows] @ ctx.read(rows) for rows in some_rows(ctx.num_rows))
        return reduce(torch.add, parts), None, None


def some_rows(number: int) -> list[slice]:
    """Of the embedding or the head, those that are read together."""
    return [slice(start, min(start + ROWS_AT_ONCE, number)) for start in range(0, number, ROWS_AT_ONCE)]


class Predictions:
    """What comes out for a text, segment by segment: a `tasks.base.Outputs`. Reads no more than the head for each question.

    Segments are found by their tokens, so that equal ones, which have equal answers, need not be told apart.
    """

    def __init__(self, stream: Stream, tokens: Tensor, states: States, numbers: Numbers) -> None:
        self._stream, self._states, self._numbers = stream, states, numbers
        self._places = {segment.numpy().tobytes(): place for place, segment in enumerate(tokens)}

    def __call__(self, tokens: Tensor) -> Tensor:
        places = [self._places[segment.numpy().tobytes()] for segment in tokens]
        hidden = torch.cat([self._states.read(slice(place, place + 1)) for place in places])
        with self._stream.head(self._numbers) as run:
            return run(hidden)
