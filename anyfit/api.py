"""What anyfit does, as functions: the command line has the same verbs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from transformers import PreTrainedModel

from anyfit import devices, estimates
from anyfit.architectures import architecture_of
from anyfit.calibration import generated, pictures
from anyfit.calibration.data import PURPOSES, Segments, is_named, load
from anyfit.calibration.defaults import LONGEST_SEGMENT, NUM_REPORT, Data, segment_length, usual
from anyfit.calibration.generated import SELF
from anyfit.calibration.saturation import Saturation
from anyfit.checkpoint import Checkpoint
from anyfit.core.budget import BYTES, LATENCY, MACS, WEIGHTS, Budget, memory_limit
from anyfit.core.config import format_of
from anyfit.core.effort import Effort
from anyfit.core.errors import DataError, ModelError, UserError
from anyfit.core.files import refuse_existing
from anyfit.costs.latency import LatencyTable
from anyfit.costs.probes import shape_of
from anyfit.distributed import group
from anyfit.family.family import Family, is_family
from anyfit.finalists import EXACT
from anyfit.formats import formats as all_formats
from anyfit.formats.base import CastFormat
from anyfit.gradual import GradualFit
from anyfit.importance import importances
from anyfit.importance.base import NetworkImportance
from anyfit.interface import LANGUAGE, interface_of
from anyfit.measuring import latencies
from anyfit.pipeline import Fit, Settings
from anyfit.progress import Progress, Silent
from anyfit.quantizers import quantizers
from anyfit.recipes import recipes
from anyfit.recipes.base import Nesting, Recipe, Training, Tuning
from anyfit.searchers import searchers
from anyfit.searchers.exact import require
from anyfit.streaming import num_batches
from anyfit.targets import targets
from anyfit.targets.base import Target
from anyfit.trainers.losses import ORIGINAL, TOWARDS
from anyfit.training import MOST_BITS, decided, nested_sizes
from anyfit.zoo import MODEL

NUM_CALIBRATION, NUM_SEARCH = 128, 16
TARGET = "llama.cpp"
"""Where neither a target nor a table of latencies is named."""


class Wishes(TypedDict, total=False):
    """What decides a family; the same for `fit` and `plan`. See `prepare`."""

    data: Data
    target: str | None
    formats: Iterable[str] | None
    recipe: str
    importance: str | None
    latency: str | Path | None
    recover: Iterable[str] | None
    towards: str
    patience: int | None
    length: int | None
    segments: int | None
    effort: str
    search: str
    seed: int
    device: str
    trust_remote_code: bool


def fit(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    force: bool = False,
    restart: bool = False,
    memory: str | None = None,
    progress: Progress | None = None,
    **wishes: Unpack[Wishes],
) -> Family:
    """Turn a network into a family, the folder `output`; `wishes` are those of `prepare`.

    `memory`: what the run may use of the machine's memory, and each process of its graphics processor's, such as "8GB" (default: three
    quarters of what is free). A run that would take more is refused before it starts.

    A run that was killed is continued by the same call; `restart` throws away what it had done. An existing
    `output` is only replaced with `force`. Raises `UserError`s, before any long work.
    """
    progress, given = progress or Silent(), memory_limit(memory)
    name = "default" if model is None else Path(model).resolve().name
    output = Path(output) if output is not None else Path(f"{name}.family")
    refuse_existing(output, force=force, ours=is_family, inputs=_inputs(model, wishes.get("data")))
    run = prepare(model, progress=progress, **wishes)
    run.checkpoint.check_finite(progress)
    shares = {devices.CPU: run.group.size, run.device: devices.sharing(run.device, run.group.size)}
    limits = {where: devices.usable(where, given) for where in shares}
    own = {where: limit // shares[where] for where, limit in limits.items() if limit is not None}
    if devices.CPU in own:
        estimates.require_memory(run, own[devices.CPU], own[run.device])
    devices.limit(run.device, own.get(run.device, 0))
    for note in run.notes():
        progress.note(note)
    run.run(output, restart=restart, force=force)
    return Family.open(output, trust_remote_code=run.checkpoint.trust_remote_code)


def prepare(
    model: str | Path | None = None,
    *,
    data: Data = None,
    target: str | None = None,
    formats: Iterable[str] | None = None,
    recipe: str = "gptq",
    importance: str | None = None,
    latency: str | Path | None = None,
    recover: Iterable[str] | None = None,
    towards: str = ORIGINAL,
    patience: int | None = None,
    length: int | None = None,
    segments: int | None = None,
    effort: str = Effort.NORMAL,
    search: str = EXACT,
    seed: int = 0,
    device: str = devices.AUTO,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Fit:
    """A run that is ready to go: everything that can be wrong with what was asked has been looked at.

    `model`: a folder in Hugging Face form or a hub id; None takes the embedded default. `data`: text files, JSONL,
    parquet, folders of them, data sets of the hub as "hf:NAME[:CONFIG][@SPLIT]", in any mix; it is divided into text
    to calibrate with, to search with and to report on. "self", the default for other models than the embedded one, is
    text that the model writes itself when the run starts. `target`: the runtime to write for (default: that of `latency`, or llama.cpp).
    `formats`: those to choose from (default: the target's menu).
    `importance`: by what a recipe that prunes does so, instead of its own.
    `latency`: a table that `anyfit.measuring.measure` made on this device, of all formats to choose from, for a recipe that prunes.
    `recover`: falling budgets such as ("1.25x", "1.5x", "2x"): for each the network is cut, trained towards the original, and then pruned
    on for the next.
    `towards`: what a recipe that trains variants does so towards: "original", its predictions, or "task", the text itself. `patience`: such
    a recipe then looks at held-out text every hundred steps, stops after so many looks without a gain, and keeps what was best.
    `length`: tokens a segment (default: the model's context, at most 2048; 256 where the model writes them).
    `segments`: how many calibrate (default 128, of an encoder's texts or pictures 512).
    `effort`: "low", "normal" or "high", see `anyfit.core.effort.Effort`.
    `search`: who else than the exact search proposes configs, by measuring some: see `anyfit.searchers.searchers`.
    `device`: "cpu", "cuda", or "auto" for a graphics processor where there is one.
    """
    method, diligence = recipes.get(recipe), Effort.parse(effort)
    target, table = _aimed(target, latency, method)
    runtime = targets.get(target)
    quantizers.get(method.quantizer)
    searchers.get(search)
    checkpoint = Checkpoint.open(MODEL if model is None else model, trust_remote_code=trust_remote_code)
    wanted = _wanted(method, runtime, diligence, formats, checkpoint)
    data = usual(data, embedded=model is None)
    longest = generated.LENGTH if is_named(data, SELF) else LONGEST_SEGMENT
    length = segment_length(length, checkpoint.config, longest)
    where, times = devices.device(device).type, interface_of(checkpoint.config).segments
    if table is not None:
        _require_timed(table, checkpoint, target)
    settings = Settings(
        target=target,
        formats=wanted,
        recipe=recipe,
        length=length,
        num_calibration=segments or NUM_CALIBRATION * times,
        num_search=NUM_SEARCH * times,
        num_report=NUM_REPORT * times,
        seed=seed,
        effort=diligence,
        search=search,
        device=where,
        latency=None if table is None else table.digest,
        recover=_recovered(method, recover),
        towards=_towards(method, towards),
        patience=_patience(method, patience),
        importance=_important(method, importance),
    )
    progress = progress or Silent()
    # The model that writes text is the run's own, so that it is loaded once, and only when it is needed.
    kind = GradualFit if settings.recover else Fit
    run: Fit = kind(checkpoint, _segments(data, checkpoint, settings, lambda: run.model, progress), settings, progress, group(), table)
    _require_possible(run)
    return run


def _require_possible(run: Fit) -> None:
    """Raises `UserError` where the target, the recipe, the budgets, the text or the network don't go with the others."""
    name, length = run.checkpoint.name, run.settings.length
    if reason := run.target.supports(run.source):
        raise UserError(f"{run.target.name} can't run {name}: {reason}.", remedy="Take another target: anyfit targets lists them.")
    _require_subject(run.recipe, run)
    if reason := searchers.get(run.settings.search).refuses(run.space):
        raise UserError(f"{run.settings.search} can't search what {run.recipe.name} decides about: {reason}.", remedy="Leave out --search.")
    if isinstance(run, GradualFit):
        run.require_budgets()
    most = num_batches(run.segments.num_segments("calibration"), length)
    if run.group.size > most:
        raise UserError(f"{run.group.size} processes can't share {most} batches of text.", remedy="Start fewer, or give more --segments.")
    if not any(weight.block is not None for decision in run.space.decisions for weight in decision.unit.weights):
        raise ModelError(f"{name} has no blocks.", remedy="Check num_hidden_layers in its config.json.")


def _wanted(method: Recipe, runtime: Target, effort: Effort, formats: Iterable[str] | None, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The formats to choose from, as named or as the recipe and the target have them. Raises `UserError` for what isn't loaded."""
    found = _usual(method, runtime, effort, checkpoint) if formats is None else tuple(dict.fromkeys(formats))
    loaded = f"It loads: {', '.join(runtime.formats)}."
    if not found and method.pruning is None:
        raise UserError(f"No format was named for {runtime.name}.", remedy=loaded)
    for name in found:
        all_formats.get(name)
        if name not in runtime.formats:
            raise UserError(f"{runtime.name} doesn't load the format {name}.", remedy=loaded)
    if method.masks and (len(found) > 1 or not isinstance(all_formats.get(found[0]), CastFormat)):
        raise UserError(
            f"{method.name} masks the numbers of one floating-point format, and {', '.join(found)} was named.",
            remedy=f"Leave out --formats, or say --formats {_own_format(runtime, checkpoint)}.",
        )
    return found


def _usual(method: Recipe, runtime: Target, effort: Effort, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The formats to choose from where none were named."""
    if method.masks:
        return (_own_format(runtime, checkpoint),)
    menus = method.formats.get(runtime.name, (runtime.menu(effort),))
    if len(menus) == 1:
        return menus[0]
    model = checkpoint.skeleton()
    shapes = {weight.shape for weight in architecture_of(model).weights(model) if weight.block is not None}
    possible = (menu for menu in menus if not any(all_formats.get(name).refuses(shape) for name in menu for shape in shapes))
    return next(possible, menus[-1])


def _own_format(runtime: Target, checkpoint: Checkpoint) -> str:
    """The floating-point format of a runtime that is nearest to a network's own type."""
    own = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(checkpoint.dtype, "F32")
    return own if own in runtime.formats else "F32"


def _recovered(method: Recipe, budgets: Iterable[str] | None) -> tuple[str, ...]:
    """The budgets to cut and train for. Raises `UserError` for a recipe that doesn't, and where none are named."""
    if budgets is None:
        return ()
    found = tuple(budgets)
    if not found:
        raise UserError("No budget was named to cut and train for.", remedy="Name some, as 1.25x or 50%, or leave out --recover.")
    if method.recovery is None:
        known = ", ".join(name for name in recipes if recipes.get(name).recovery)
        raise UserError(f"{method.name} leaves nothing out that training could make good for.", remedy=f"Take --recipe {known}.")
    return found


def _important(method: Recipe, name: str | None) -> str | None:
    """As it was given. Raises `UserError` for a recipe that takes no heads or channels out, and for an importance that isn't known."""
    if name is not None and method.pruning is None:
        raise UserError(f"{method.name} takes no heads and channels out, so that none matter more.", remedy="Take --recipe ziplm.")
    return name if name is None else importances.get(name).name


def _towards(method: Recipe, name: str) -> str:
    """As it was given. Raises `UserError` for what nothing is trained towards, and for a recipe that has no say in it."""
    if name not in TOWARDS:
        raise UserError(f"Nothing is trained towards {name!r}.", remedy=f"Known: {', '.join(TOWARDS)}.")
    if name != ORIGINAL and not isinstance(method.training, Training | Nesting):
        raise UserError(f"{method.name} trains nothing towards {name!r}.", remedy=f"Take {_those_that_train(Training, Nesting)}.")
    return name


def _patience(method: Recipe, number: int | None) -> int | None:
    """As it was given. Raises `UserError` for one that is none, and for a recipe that trains nothing."""
    if number is not None and number < 1:
        raise UserError(f"A patience of {number} would stop before anything was trained.", remedy="Give a number from 1 on.")
    if number is not None and method.training is None:
        remedy = f"Take {_those_that_train(Training, Nesting, Tuning)}."
        raise UserError(f"{method.name} trains nothing that could end early.", remedy=remedy)
    return number


def _those_that_train(*kinds: type) -> str:
    return ", ".join(name for name in recipes if isinstance(recipes.get(name).training, kinds))


def _require_subject(method: Recipe, run: Fit) -> None:
    """Raises `UserError` where a recipe has nothing to work on among a run's choices, or none of what it is about."""
    if interface_of(run.checkpoint.config) is not LANGUAGE and (method.training or (run.effort.refines and not method.pruning)):
        raise UserError(
            f"{run.checkpoint.name} is no language model, and {'training' if method.training else 'high effort'} brings down what next "
            "tokens diverge by.",
            remedy="Take --recipe gptq or ziplm, and --effort normal.",
        )
    found = importances.get(method.pruning) if method.pruning else None
    if isinstance(found, NetworkImportance) and interface_of(run.checkpoint.config) not in found.reads:
        tasks = ", ".join(interface.task for interface in found.reads)
        raise UserError(
            f"{method.name} asks the whole network what it loses, which {found.name} knows of {tasks}; {run.checkpoint.name} is for "
            f"{interface_of(run.checkpoint.config).task}.",
            remedy="Take --recipe ziplm.",
        )
    if isinstance(method.training, Nesting):
        nested_sizes(decided(run.space, method.training))
    elif method.training and not decided(run.space, method.training):
        raise UserError(
            f"{method.name} has nothing to train: no matrix in the blocks of {run.checkpoint.name} can have a format of at most "
            f"{MOST_BITS:g} bits that it trains.",
            remedy="Name such formats, or take --recipe gptq.",
        )
    if method.needs and not set(method.needs) & set(run.space.formats()):
        raise UserError(
            f"{method.name} is about {', '.join(method.needs)}, and none of these is a choice here.",
            remedy=f"Take --target {' or '.join(method.formats)} and leave out --formats, or take --recipe gptq.",
        )


def _aimed(target: str | None, latency: str | Path | None, method: Recipe) -> tuple[str, LatencyTable | None]:
    """The target, which a table of latencies says where nobody else does, and that table. Raises `UserError` where a recipe has no use for
    one."""
    if latency is None:
        return TARGET if target is None else target, None
    if method.pruning is None:
        raise UserError(f"{method.name} decides about formats, and latencies are about heads and channels.", remedy="Take --recipe ziplm.")
    table = latencies(Path(latency).expanduser())
    return table.target if target is None else target, table


def _require_timed(table: LatencyTable, checkpoint: Checkpoint, target: str) -> None:
    """Raises `UserError` where a table isn't of this network and runtime."""
    if table.target != target:
        raise UserError(
            f"The latencies were measured for {table.target}, not for {target}.", remedy="Leave out --target, or measure again."
        )
    table.require_of(shape_of(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code))


def _segments(
    data: str | Path | Sequence[str | Path],
    checkpoint: Checkpoint,
    settings: Settings,
    model: Callable[[], PreTrainedModel],
    progress: Progress,
) -> Segments:
    counts = dict(zip(PURPOSES, (settings.num_calibration, settings.num_search, settings.num_report), strict=True))
    interface = interface_of(checkpoint.config)
    if is_named(data, SELF) and interface is not LANGUAGE:
        raise DataError(
            f"{checkpoint.name} is an encoder, which writes nothing to calibrate with.",
            remedy="Name what it will read, with --data: JSONL of a text a line, text files, or hf:NAME; of a network of pictures, these.",
        )
    if not interface.words:
        return pictures.load(data, checkpoint.folder, checkpoint.config, counts, seed=settings.seed)
    tokenizer, length, seed = checkpoint.tokenizer(), settings.length, settings.seed
    if is_named(data, SELF):
        return generated.generated(model, tokenizer, counts, length=length, seed=seed, progress=progress)
    return load(
        data,
        tokenizer,
        length=length,
        num_calibration=settings.num_calibration,
        num_search=settings.num_search,
        num_report=settings.num_report,
        seed=seed,
        texts=interface is not LANGUAGE,
    )


@dataclass(frozen=True)
class Plan:
    """What a fit would take and what could come of it. Bytes, seconds; `coverage` as a family's.

    `saturation`: whether more text would help, where that was asked and there is text enough to say.
    """

    model: str
    target: str
    recipe: str
    formats: tuple[str, ...]
    num_parameters: int
    original_bytes: int
    smallest_bytes: int
    largest_bytes: int
    memory_bytes: int
    device: str
    device_memory_bytes: int
    disk_bytes: int
    seconds: float
    coverage: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    saturation: Saturation | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"saturation": self.saturation and self.saturation.to_json()}


def plan(
    model: str | Path | None = None,
    *,
    budget: str | Iterable[str] | None = None,
    saturation: bool = False,
    progress: Progress | None = None,
    **wishes: Unpack[Wishes],
) -> Plan:
    """What `fit` with these wishes would need and offer, from trying its largest matrix and a little text.

    With `saturation` also whether more calibration text would help: that takes the calibration pass of a fit.
    Raises what `fit` would raise, and `BudgetError` for a `budget` that no config of the family could meet.
    """
    progress = progress or Silent()
    if budget is not None:
        Budget.parse(budget, original=dict.fromkeys((BYTES, LATENCY, MACS, WEIGHTS), 1.0))
    began = time.perf_counter()
    run = prepare(model, progress=progress, **wishes)
    space = run.space
    if budget is not None:
        require(space, Budget.parse(budget, original=space.original(run.checkpoint.bytes_)))
    if saturation and (run.structures or run.recipe.masks):
        raise UserError(
            f"Saturation is about rounding, and {run.settings.recipe} is about what is left out.",
            remedy="Leave it out, or take --recipe gptq.",
        )
    run.checkpoint.check_finite(progress)
    prepared = time.perf_counter() - began  # as a fit will
    needs = estimates.needs(run)
    return Plan(
        model=run.checkpoint.name,
        target=run.settings.target,
        recipe=run.settings.recipe,
        formats=tuple(dict.fromkeys(map(format_of, space.formats()))),
        num_parameters=space.num_parameters,
        original_bytes=run.checkpoint.bytes_,
        smallest_bytes=space.bytes_(space.smallest()),
        largest_bytes=space.bytes_(space.largest()),
        memory_bytes=needs.memory,
        device=run.device.type,
        device_memory_bytes=needs.device_memory,
        disk_bytes=needs.disk,
        seconds=prepared + needs.seconds,
        coverage=run.coverage(),
        notes=run.notes(),
        saturation=estimates.saturation(run) if saturation else None,
    )


def _inputs(model: str | Path | None, data: Data) -> list[Path]:
    """What must not be written over: the model and the text."""
    texts = [] if data is None else [data] if isinstance(data, (str, Path)) else list(data)
    return [Path(given).expanduser() for given in (*([] if model is None else [model]), *texts)]
