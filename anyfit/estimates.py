"""What a run would take, told before it: memory, time, and whether it has text enough."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from anyfit import devices, recovery
from anyfit.calibration import generated
from anyfit.calibration.collect import Moments, observed
from anyfit.calibration.data import PURPOSES
from anyfit.calibration.saturation import Saturation, saturate
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.budget import BYTES, describe
from anyfit.core.config import SPARSITY, format_of
from anyfit.core.errors import UserError
from anyfit.core.memory import Peak, release
from anyfit.core.space import Decision
from anyfit.core.units import Weight
from anyfit.distributed import ALONE
from anyfit.encoding import NUMBERS_AT_ONCE, Encoding, variants, works
from anyfit.family.store import Store
from anyfit.finalists import EXACT, NUM_FINALISTS, NUM_REFINED, measuring
from anyfit.formats import formats as all_formats
from anyfit.importance import importances
from anyfit.importance.base import NetworkImportance
from anyfit.importance.magnitude import IMPORTANCE as MAGNITUDE
from anyfit.interface import interface_of
from anyfit.masking import Masking
from anyfit.pipeline import Fit, num_probed
from anyfit.quantizers import aqlm
from anyfit.quantizers.worker import Workers, num_workers
from anyfit.recipes.base import Nesting, Tuning
from anyfit.scores.kl import num_probes
from anyfit.scores.table import Table
from anyfit.searchers import searchers
from anyfit.streaming import TOKENS_AT_ONCE, States, batches
from anyfit.structure.levels import kept_of
from anyfit.structuring import Structuring
from anyfit.tasks import task_of
from anyfit.trainers import samplers
from anyfit.training import decided, nested
from anyfit.tuning import refining
from anyfit.tuning.refining import WINDOW, Settings

T = TypeVar("T")

STEADY, BRIEF = 0.5, 0.1
"""Seconds. Anything quicker isn't known from doing it once; briefly, where there are many such things."""


def saturation(run: Fit) -> Saturation | None:
    """On one matrix for each input of the middle block, in the format of the fewest bits that it may have."""
    blocks = sorted({weight.block for weight in run.weights if weight.block is not None})
    choices = {weight: decision.choices for decision in run.space.decisions for weight in decision.unit.weights}
    chosen = {weight.input: weight for weight in reversed(run.weights) if weight.block == blocks[len(blocks) // 2] and weight.input}
    lowest = {weight: min(choices[weight], key=lambda choice: choice.bytes_).name for weight in chosen.values()}
    parameters = dict(run.model.named_parameters(remove_duplicate=False))
    quantizer = run.quantizer

    def stored(weight: Weight, matrix: Tensor, statistics: InputStatistics) -> Tensor:
        format_ = all_formats.get(lowest[weight])
        return format_.decode(quantizer.encode(matrix, quantizer.prepare(statistics), format_).data).to(matrix.device)

    matrices = {weight: parameters[weight.name].float() for weight in chosen.values()}
    matrices = {weight: matrix.T.contiguous() if weight.transposed else matrix for weight, matrix in matrices.items()}
    return saturate(run.model, run.architecture, matrices, run.segments, stored, seed=run.settings.seed, progress=run.progress)


@dataclass(frozen=True)
class Needs:
    """What a fit would take. `memory`: peak bytes of the process, the interpreter's own included; `disk`: peak bytes while it
    lasts; `seconds`: of this machine. `device_memory`: peak bytes of a graphics processor, 0 where none is used."""

    memory: int
    disk: int
    seconds: float
    device_memory: int = 0


def needs(run: Fit) -> Needs:
    """Known by doing each kind of work once, on the largest block and on as much text as is read together."""
    with tempfile.TemporaryDirectory() as folder:
        peak = devices.Peak(run.device)
        rehearsal = _Rehearsal(run, Path(folder))
        seconds = rehearsal.seconds()
        # The network that writes text stays.
        writer = 4 * run.space.num_parameters if run.segments.num_pending else 0
        on_device = run.device.type != "cpu"
        whole = _whole_matrices(run)
        memory, device_memory = rehearsal.memory + whole + (0 if on_device else writer), peak.bytes_ + (whole + writer if on_device else 0)
    if _takes_all(run):
        if run.device.type == "cpu":
            memory = max(memory, Peak().bytes_ + _in_memory(run))
        else:
            memory, device_memory = max(memory, Peak().bytes_ + 4 * run.space.num_parameters), max(device_memory, _in_memory(run))
    return Needs(memory, disk(run), seconds, device_memory)


def require_memory(run: Fit, limit: int, device_limit: int) -> None:
    """Raises `UserError` where a fit would take more than `limit` bytes of memory, or more than `device_limit` of a graphics processor's.
    Networks that are small for it aren't rehearsed."""
    if _surely(run) <= min(limit, device_limit):
        return
    needs_ = needs(run)
    if run.device.type != "cpu" and needs_.device_memory > device_limit:
        raise UserError(
            f"Fitting {run.checkpoint.name} takes {describe(BYTES, needs_.device_memory)} of the graphics processor's memory, and "
            f"{describe(BYTES, device_limit)} may be used.",
            remedy="Say --device cpu, or close what else uses it.",
        )
    needed = needs_.memory
    if needed <= limit:
        return
    whole = " --effort normal doesn't hold the whole network in memory." if run.effort.refines else ""
    whole += " --search exact doesn't, either." if run.settings.search != EXACT else ""
    whole += " --recipe gptq trains nothing, and doesn't hold it either." if run.recipe.training else ""
    whole += " With text of yours (--data) the model needn't write any, which takes it whole." if run.segments.num_pending else ""
    each = "" if run.group.alone else f" in each of {run.group.size} processes"
    raise UserError(
        f"Fitting {run.checkpoint.name} takes {describe(BYTES, needed)} of memory{each}, and {describe(BYTES, limit)} may be used.",
        remedy=f"Say --memory {math.ceil(needed * run.group.size / 10**7) / 100:.2f}GB where there is as much.{whole}",
    )


def _surely(run: Fit) -> int:
    """Bytes that are enough in any case and any memory: many times what a block and its widest input hold."""
    sizes = Counter[int | None]()
    for weight in run.weights:
        sizes[weight.block] += weight.num_weights
    widest = max(weight.shape[1] for weight in run.weights)
    config = run.checkpoint.config
    logits = 4 * interface_of(config).width(config) * max(TOKENS_AT_ONCE, run.settings.length)
    streamed = 2 * 10**9 + 40 * max(sizes.values()) + 60 * widest**2 + 8 * logits + _whole_matrices(run)
    return max(streamed, Peak().bytes_ + _in_memory(run)) if _takes_all(run) else streamed


def _whole_matrices(run: Fit) -> int:
    """Bytes of what is encoded at once because its rows share something: more than a rehearsal on some of the rows shows."""
    if run.structures or run.recipe.masks:
        return 0
    sizes = [d.unit.weights[0].num_weights for d in run.space.decisions if any(all_formats.get(c.name).whole for c in d.choices)]
    return aqlm.BYTES_A_NUMBER * sum(sorted(sizes)[-num_workers(run.device) :])


def _takes_all(run: Fit) -> bool:
    """Whether some stage has the whole network in memory."""
    return (
        bool(measuring(run.settings.search, run.effort))
        or bool(run.segments.num_pending or run.settings.recover)
        or run.recipe.training is not None
        or _scores_whole(run) is not None
    )


def _scores_whole(run: Fit) -> NetworkImportance | None:
    """The importance, if it looks at the whole network."""
    found = importances.get(run.recipe.pruning) if run.recipe.pruning else None
    return found if isinstance(found, NetworkImportance) else None


def _in_memory(run: Fit) -> int:
    """Bytes of what only works with the whole network in memory: writing text, training, searching by measuring, and refining."""
    model = 4 * run.space.num_parameters
    writing = generated.memory(run.checkpoint.config, run.settings.length) if run.segments.num_pending else 0
    solving = (1 + refining.NETWORKS) * model if run.effort.refines else 0
    searching = model if measuring(run.settings.search, run.effort) else 0
    # Training holds every variant's codes and scales, and what is made of those that are drawn.
    decisions = decided(run.space, run.recipe.training) if run.recipe.training else ()
    variants = sum(len(decision.choices) * decision.unit.num_weights for decision in decisions)
    # Tuning holds levels, a buffer, squares, values, gradients and what they are made of, of one format at a time.
    each = 12 * model if isinstance(run.recipe.training, (Tuning, Nesting)) else 4 * model + 2 * variants
    training = model + each if run.recipe.training else 0
    if run.shards:
        # Codes and what blocks take are shared out, but for one block at a time; adapters, scales and what is outside are in each process.
        blocks = Counter[int | None]()
        for weight in run.weights:
            blocks[weight.block] += 4 * weight.num_weights * (weight.block is not None)
        inside = sum(blocks.values())
        training = 5 * (model - inside) + 3 * max(blocks.values()) + variants + (5 * inside + variants) // run.group.size
    recovering = recovery.NETWORKS * model + _compared(run) if run.settings.recover else 0
    return max(model + max(writing, searching, solving, recovering), training)


def _compared(run: Fit) -> int:
    """Bytes of what recovery compares of each micro-batch: the original's states and what differs from them, and its predictions."""
    assert run.recipe.recovery is not None
    config, blocks = run.checkpoint.config, run.architecture.num_blocks(run.checkpoint.skeleton())
    tokens = run.recipe.recovery.settings.micro_batch * min(WINDOW, run.settings.length)
    return 4 * tokens * (2 * (blocks + 1) * config.hidden_size + interface_of(config).width(config))


def _variants(run: Fit, decision: Decision) -> int:
    """Bytes of the variants of one unit. Of an attention or a feed-forward only the matrix that reads it has one for each size."""
    structure = run.structures.get(decision.unit.name)
    if decision.axis == SPARSITY:
        return decision.choices[0].stored_bytes + (len(decision.choices) - 1) * -(-decision.unit.num_weights // 8)
    if structure is None:
        nested = decision.unit.weights[0].name in run.nested
        return sum(decision.choice(name).stored_bytes for name, _ in works((choice.name for choice in decision.choices), nested))
    formats = {name: all_formats.get(name) for name in map(format_of, (choice.name for choice in decision.choices))}
    sizes = [(formats[format_of(choice.name)], kept_of(choice.name) or 0) for choice in decision.choices]
    levels = sum(structure.reader.shape[0] * format_.row_bytes(kept * structure.size) for format_, kept in sizes if kept)
    return levels + sum(format_.bytes_(weight.shape) for format_ in formats.values() for weight in structure.rest)


def disk(run: Fit) -> int:
    """The family, and the hidden states of the stage that has the most of them."""
    family = sum(_variants(run, decision) for decision in run.space.decisions) + run.space.fixed_bytes
    blocks = run.architecture.num_blocks(run.checkpoint.skeleton())
    tokens = {name: run.segments.num_segments(name) * run.settings.length for name in PURPOSES}
    probing = (blocks + 2) * min(tokens["search"], num_probed(run.checkpoint.config) * run.settings.length)
    measuring = 2 * (tokens["search"] + tokens["report"])
    return family + 4 * run.checkpoint.config.hidden_size * max(2 * tokens["calibration"], probing, measuring)


class _Rehearsal:
    """Every stage of a fit on a little of everything, timed. `memory`: bytes that the process held at most."""

    def __init__(self, run: Fit, folder: Path) -> None:
        self.run = run
        self.store = Store(folder)
        self.stream = run.streamed(folder / "states")
        length = run.settings.length
        segments = max(1, TOKENS_AT_ONCE // length)
        self.memory = 0
        self.tokens = self.stream.interface.example(run.checkpoint.config, segments, length)

    def seconds(self) -> float:
        run, stream, peak = self.run, self.stream, Peak()
        tokens = {name: run.segments.num_segments(name) * run.settings.length for name in PURPOSES}
        sizes = Counter[int]()
        for weight in run.weights:
            if weight.block is not None:
                sizes[weight.block] += weight.num_weights
        block = max(sizes, key=lambda index: sizes[index])
        states, embedding = _steadily(lambda: stream.embedded(self.tokens, stream.original))
        weights = [weight for weight in run.weights if weight.block == block]
        into = stream.states(states.length, states.width)
        rounded = run.calibration_pass(self.store, stream, self.tokens).rounded(weights)
        with observed(stream.model, run.architecture, weights, rounded=rounded) as moments, devices.matrix_speed(run.device):
            _, calibrating = _timed(lambda: stream.advance(block, self.tokens, states, stream.original, into))
        _, forward = _steadily(lambda: stream.advance(block, self.tokens, states, stream.original, into))
        encoding = self._encoding(weights, moments)
        self.memory, peak = peak.bytes_, Peak()
        gradients = _timed(lambda: self._backward(block, states, into))[1]
        head = self._head(into)
        kept = sum(task_of(run.checkpoint.config).memory(tokens[name], run.checkpoint.config) for name in ("search", "report"))
        self.memory = max(self.memory, peak.bytes_ + kept)
        each = len(self.tokens) * run.settings.length
        # Every uniform setting, and an optimum of its size; those of the smallest and the largest are among the finalists, or the same.
        num_configs = NUM_FINALISTS + 2 * max(0, len(run.space.uniforms()) - 2)
        reading = embedding + head + stream.num_blocks * forward
        probed = num_probed(run.checkpoint.config) * run.settings.length
        held_out = tokens["search"] + tokens["report"]
        total = encoding + tokens["calibration"] / each * (embedding + stream.num_blocks * calibrating)
        backward, probes = 2 * reading + stream.num_blocks * gradients, num_probes(run.space.decisions)
        if run.recipe.score == "fisher":
            total += probed / each * (reading + backward)
        else:  # each probe is a pass from its block on: half of one, on average
            total += probed / each * (reading * (1 + probes / 2) + (backward if probes < len(run.space.decisions) else 0))
        total += held_out / each * (num_configs + 1) * reading
        total += generated.READINGS * run.segments.num_pending / each * reading
        if (whole := _scores_whole(run)) is not None:
            text = torch.empty(tokens["calibration"] // run.settings.length, run.settings.length, device="meta")
            total += whole.readings(run.structures, text, stream.interface) * text.numel() / each * reading
        return total + (_more_effort(run, tokens) + _training(run)) / each * reading

    def _encoding(self, weights: list[Weight], moments: dict[str, Moments]) -> float:
        """Seconds to make all variants."""
        made = self.run.calibration_pass(self.store, self.stream, self.tokens)
        if isinstance(made, Structuring):  # what the whole network says of its structures is counted by itself
            made = replace(made, importance=lambda _: MAGNITUDE)
        if isinstance(made, Structuring | Masking):
            return self._pruned(made, weights, moments)
        assert isinstance(made, Encoding)
        return self._encoded(made, weights, moments)

    def _pruned(self, pruning: Structuring | Masking, weights: list[Weight], moments: dict[str, Moments]) -> float:
        """Seconds to prune or mask all blocks, and encode: those of one, all that it holds, times their number. No other process takes
        part."""
        alone = replace(pruning, group=ALONE)
        groups = [group for group in alone.groups() if group[0] in weights]
        with self.run.progress.stage(alone.name, 0) as stage, alone.encoder(stage) as encoder:
            return self.stream.num_blocks * _timed(lambda: encoder.encode(groups, moments))[1]

    def _encoded(self, encoding: Encoding, weights: list[Weight], moments: dict[str, Moments]) -> float:
        """Seconds to encode everything: the inputs of one block, and some rows on each of them in each format, as many at once as in
        the run; and of tables that are only looked up."""
        run, quantizer = self.run, encoding.quantizer
        costs: dict[tuple[int, bool, str], float] = {}
        preparing: dict[int, float] = {}

        def rehearse(weight: Weight, statistics: InputStatistics) -> float:
            columns = weight.shape[1]
            wanted = [all_formats.get(name) for name in encoding.choices[weight.name]]
            prepared, spent = _timed(lambda: quantizer.prepare(statistics, wanted))
            rows = encoding.rows(weight, slice(min(weight.shape[0], max(1, NUMBERS_AT_ONCE[run.device.type] // columns))))
            for name, within in encoding.works(weight):
                encode = partial(variants, quantizer, prepared=prepared, name=name, within=within)
                encode(rows[:1])  # what is compiled, or read from disk, is so only once
                pieces = [rows] * workers.number
                _, passed = _steadily(lambda: list(workers.map(encode, pieces)), BRIEF)  # noqa: B023 (called at once)
                costs[columns, weight.input is None, name] = passed / (rows.numel() * workers.number)
            return spent

        by_input = {weight.input: weight for weight in reversed(weights) if weight.input is not None}
        tables = {weight.shape[1]: weight for weight in run.weights if weight.input is None}
        with Workers(run.device) as workers:
            for weight in tables.values():
                rehearse(weight, InputStatistics.unknown(weight.shape[1]))
            # The widest first, beside the moments of the others, as in the run itself.
            for weight in sorted(by_input.values(), key=lambda w: -w.shape[1]):
                statistics = moments.pop(str(weight.input)).statistics(weight.name)
                if weight.shape[1] not in preparing:
                    preparing[weight.shape[1]] = rehearse(weight, statistics)
                release()
        total = sum(preparing[min(preparing, key=lambda c: abs(c - w.shape[1]))] for w in self._distinct_inputs())
        for decision in run.space.decisions:
            for weight in decision.unit.weights:
                table = weight.input is None
                columns = min((c for c, t, _ in costs if t == table), key=lambda c: abs(c - weight.shape[1]))
                known = {name: cost for (width, t, name), cost in costs.items() if (width, t) == (columns, table)}
                rest = max(known.values(), default=0.0)
                total += sum(known.get(name, rest) for name, _ in encoding.works(weight)) * weight.num_weights
        return total

    def _distinct_inputs(self) -> list[Weight]:
        return list({weight.input: weight for weight in self.run.weights if weight.input is not None}.values())

    def _backward(self, block: int, states: States, gradients: States) -> None:
        """What the score takes of one block."""
        with self.stream.block(block, self.stream.original) as run, torch.enable_grad():
            for segments in batches(self.tokens):
                hidden = states.read(segments).requires_grad_()
                output = run(self.tokens[segments], hidden)
                output.backward(gradients.read(segments).to(output.device))

    def _head(self, final: States) -> float:
        """Seconds to measure what the last block makes of the tokens against the original."""
        predictions = self.stream.predictions(self.tokens, self.stream.original, final)
        reference = task_of(self.run.checkpoint.config).reference(predictions, self.tokens, kept_bytes=0)
        other = self.stream.predictions(self.tokens, self.stream.original, final)
        return _steadily(lambda: reference.measured(other))[1]


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def _steadily(work: Callable[[], T], seconds: float = STEADY) -> tuple[T, float]:
    """What is over soon is done again for a while; the median."""
    found, spent = _timed(work)
    passed = [spent]
    while sum(passed) < seconds:
        passed.append(_timed(work)[1])
    return found, statistics.median(passed)


def _more_effort(run: Fit, sizes: Mapping[str, int]) -> int:
    """Tokens that searchers that measure and refining read, as forward passes."""
    searched = measuring(run.settings.search, run.effort)
    searching = sum(searchers.get(name).num_segments(number) for name, number in searched.items()) * run.settings.length
    if not run.effort.refines:
        return searching
    settings = Settings()
    # Both networks run through a block to each of its inputs, three passes in all; a step of tuning costs three.
    solving = 6 * min(settings.num_segments, len(run.segments.calibration)) * run.settings.length
    tuning = 3 * settings.tuning.num_segments * min(WINDOW, run.settings.length)
    return searching + NUM_REFINED * (solving + tuning + 2 * (sizes["search"] + sizes["report"]))


def _training(run: Fit) -> int:
    """Tokens of training, as forward passes: the original's, and three of the network for each config of a step."""
    how = run.recipe.training
    if how is None:
        return _recovery(run)
    settings = how.settings_for(run.effort)
    decisions, step = decided(run.space, how), settings.batch_size * min(WINDOW, run.settings.length)
    if isinstance(how, Tuning):
        formats = {choice.name for decision in decisions for choice in decision.choices}
        return 5 * len(formats) * settings.num_steps * step
    decisions = nested(decisions) if isinstance(how, Nesting) else decisions
    losses = {d.unit.name: {choice.name: 1 / choice.stored_bytes for choice in d.choices} for d in decisions}
    sampler = samplers.get(how.sampler)(decisions, settings.num_steps, Table(dict.fromkeys(losses, 1.0), losses))
    return (1 + 3 * len(sampler.draws(0, 0))) * settings.num_steps * step


def _recovery(run: Fit) -> int:
    """Tokens of cutting and training for one budget after another, as forward passes: three of the network, and the original's; from the
    second on also those of pruning what was trained."""
    if not run.settings.recover:
        return 0
    assert run.recipe.recovery is not None
    settings, again = run.recipe.recovery.settings_for(run.effort), len(run.settings.recover) - 1
    trained = 4 * settings.num_steps * settings.batch_size * min(WINDOW, run.settings.length)
    read = run.segments.num_segments("calibration") + num_probed(run.checkpoint.config)
    return (1 + again) * trained + again * read * run.settings.length
