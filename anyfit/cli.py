"""The command line: one command for each public function, with the same names.

Nothing heavy is imported before a command needs it. The answer goes to standard output, as tables or, with
`--json`, as exactly one JSON document; everything else goes to standard error.
"""

from __future__ import annotations

import webbrowser
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyfit import options
from anyfit.answers import Answer, app, command, run
from anyfit.core.budget import BYTES, describe
from anyfit.core.effort import Effort
from anyfit.core.errors import UnknownNameError, UserError
from anyfit.core.files import refuse_existing
from anyfit.core.registry import Registry
from anyfit.formats import formats as all_formats
from anyfit.progress import duration, to_stderr
from anyfit.recipes import recipes as all_recipes
from anyfit.searchers import searchers as all_searchers
from anyfit.targets import targets as all_targets

__all__ = ["app", "run"]

if TYPE_CHECKING:
    from rich.console import RenderableType

    from anyfit.calibration.saturation import Saturation
    from anyfit.family import Family


def _names(given: Iterable[str] | None) -> list[str] | None:
    """Repeated and comma-separated names as one list."""
    return [name.strip() for part in given for name in part.split(",") if name.strip()] if given else None


def _require_known(registry: Registry[Any], names: Iterable[str]) -> None:
    """Refuse a misspelt name at once, before anything heavy is imported."""
    for name in names:
        if name not in registry:
            raise UnknownNameError(registry.kind, name, registry)


def _require_all_known(target: str | None, recipe: str, search: str, formats: list[str] | None) -> None:
    _require_known(all_targets, [] if target is None else [target])
    _require_known(all_recipes, [recipe])
    _require_known(all_searchers, [search])
    _require_known(all_formats, formats or [])


@app.callback(invoke_without_command=True)
def main(show_version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False) -> None:
    if show_version:
        print(version("anyfit"))
        raise typer.Exit


@command
def plan(
    model: options.Model = None,
    data: options.Data = None,
    target: options.TargetName = None,
    formats: options.Formats = None,
    recipe: options.RecipeName = "gptq",
    importance: options.Importance = None,
    latency: options.Latency = None,
    recover: options.Recover = None,
    budget: options.MaybeBudgets = None,
    length: options.Length = None,
    segments: options.Segments = None,
    effort: options.EffortName = Effort.NORMAL,
    search: options.SearcherName = "exact",
    saturation: Annotated[bool, typer.Option("--saturation", help="Also measure whether more text would help.")] = False,
    device: options.DeviceName = "auto",
    trust_remote_code: options.RemoteCode = False,
    log_json: options.LogJson = False,
    json_: options.Json = False,
) -> Answer:
    """What a fit would need and offer: memory, disk, time, sizes, coverage. Writes nothing."""
    wanted = _names(formats)
    _require_all_known(target, recipe, search, wanted)
    from anyfit import api
    from anyfit.report import tables
    from anyfit.report.listing import listing

    found = api.plan(
        model,
        data=data,
        target=target,
        formats=wanted,
        recipe=recipe,
        importance=importance,
        latency=latency.expanduser() if latency else None,
        recover=_names(recover),
        budget=budget,
        saturation=saturation,
        length=length,
        segments=segments,
        effort=effort,
        search=search,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=to_stderr(as_json=log_json),
    )
    rows = [
        ("model", f"{found.model}: {found.num_parameters:,} parameters, {describe(BYTES, found.original_bytes)}"),
        ("for", f"{found.target}, by {found.recipe}, in {', '.join(found.formats)}"),
        ("sizes", f"{describe(BYTES, found.smallest_bytes)} to {describe(BYTES, found.largest_bytes)}"),
        ("memory", describe(BYTES, found.memory_bytes)),
        *([("memory of " + found.device, describe(BYTES, found.device_memory_bytes))] if found.device_memory_bytes else []),
        ("disk", describe(BYTES, found.disk_bytes)),
        ("time", f"about {duration(found.seconds)}"),
    ]
    shown: list[RenderableType] = [listing(rows, "", "")]
    shown += [tables.refusals(found.coverage)] if found.coverage else []
    shown += ["", *_saturation(found.saturation)] if saturation else []
    return Answer(found.to_json(), (*shown, *found.notes))


def _saturation(found: Saturation | None) -> list[RenderableType]:
    from anyfit.report.listing import listing

    if found is None:
        return ["There is too little text to say whether more would help."]
    rows = [(f"{row.segments}", f"{row.tokens:,}", f"{row.error:.4g}") for row in found.rows]
    return [listing(rows, "segments", "tokens", "error on held-out text"), found.verdict]


@command
def fit(
    model: options.Model = None,
    data: options.Data = None,
    target: options.TargetName = None,
    formats: options.Formats = None,
    recipe: options.RecipeName = "gptq",
    importance: options.Importance = None,
    latency: options.Latency = None,
    recover: options.Recover = None,
    towards: options.Towards = "original",
    patience: options.Patience = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The family's folder. Default: MODEL.family.")] = None,
    length: options.Length = None,
    segments: options.Segments = None,
    effort: options.EffortName = Effort.NORMAL,
    search: options.SearcherName = "exact",
    memory: options.Memory = None,
    device: options.DeviceName = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Which segments of the text are drawn.")] = 0,
    trust_remote_code: options.RemoteCode = False,
    force: options.Force = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again, instead of going on with a stopped run.")] = False,
    log_json: options.LogJson = False,
    json_: options.Json = False,
) -> Answer:
    """Turn a network into a family: one run, then any size in seconds."""
    wanted = _names(formats)
    _require_all_known(target, recipe, search, wanted)
    from anyfit import api
    from anyfit.report import summary, tables

    family = api.fit(
        model,
        data=data,
        target=target,
        formats=wanted,
        recipe=recipe,
        importance=importance,
        latency=latency.expanduser() if latency else None,
        recover=_names(recover),
        towards=towards,
        patience=patience,
        output=output.expanduser() if output else None,
        length=length,
        segments=segments,
        effort=effort,
        search=search,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
        force=force,
        restart=restart,
        memory=memory,
        progress=to_stderr(as_json=log_json),
    )
    return Answer(summary.family_json(family), (_headline(family), tables.frontier(family), _page(family), *_next(family)))


@command
def show(
    family: options.FamilyPath,
    budget: options.MaybeBudgets = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    json_: options.Json = False,
) -> Answer:
    """The frontier of a family and, at a budget, what each layer got."""
    from anyfit.family import Family
    from anyfit.report import summary, tables

    opened = Family.open(family)
    chosen, notes = (opened.select(budget), opened.notes_on(budget)) if budget else (None, ())
    document = summary.family_json(opened) | {"page": str(opened.path / "report.html")}
    shown: list[RenderableType] = [_headline(opened), tables.frontier(opened, chosen)]
    if chosen:
        document["notes"] = [*document["notes"], *notes]
        document["chosen"] = summary.point_json(opened, chosen) | {"formats": chosen.config.chosen}
        shown += [f"\n{opened.budget(budget or [])}: {summary.described(opened, chosen)}", tables.layers(opened, chosen.config)]
        if opened.pruned:
            document["chosen"]["removed"] = summary.removed(opened.space, chosen.config)
            shown += filter(None, [summary.removed_in_words(opened.space, chosen.config)])
    shown += ["", tables.sparsity_table(opened)] if opened.masked else []
    if opened.coverage:
        shown += ["", tables.refusals(opened.coverage)]
    if open_:
        webbrowser.open((opened.path / "report.html").resolve().as_uri())
    return Answer(document, (*shown, *opened.notes, *notes, _page(opened)))


@command
def export(
    family: options.FamilyPath,
    budget: options.Budgets,
    output: Annotated[Path, typer.Option("--output", "-o", help="What to write. The target's suffix is added if it is missing.")],
    force: options.Force = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Don't load the written model back.")] = False,
    trust_remote_code: options.RemoteCode = False,
    json_: options.Json = False,
) -> Answer:
    """Write the best model within a budget for the family's target, and load it back."""
    from anyfit.family import Family
    from anyfit.report import summary
    from anyfit.report.listing import listing

    opened = Family.open(family, trust_remote_code=trust_remote_code)
    suffix, path = all_targets.get(opened.target).suffix, output.expanduser()
    if not path.name:
        raise UserError(f"{output} is a folder and no name for a model.", remedy=f"Name a file in it: -o {output}/model{suffix}.")
    if not path.name.lower().endswith(suffix.lower()):
        path = path.with_name(path.name + suffix)
    made = opened.export(budget, path, force=force, check=not no_check, progress=to_stderr())
    headline = f"{made.path}: {made.bytes_:,} bytes within {made.budget}, in {duration(made.seconds)}"
    checks = listing([("passed" if c.passed else "FAILED", c.name, c.detail) for c in made.checks], "", "check", "")
    shown = [headline, summary.described(opened, made.point), checks if made.checks else "Not loaded back.", *made.notes]
    return Answer(made.to_json(), tuple(shown))


@command
def refine(
    family: options.FamilyPath,
    budget: options.Budgets,
    model: Annotated[str | None, typer.Option(help="The original: a folder or hub id. Not needed for the embedded model.")] = None,
    memory: options.Memory = None,
    device: options.DeviceName = "auto",
    trust_remote_code: options.RemoteCode = False,
    json_: options.Json = False,
) -> Answer:
    """Solve the matrices of one size again for each other: closer to the original at the same bytes, in a minute or so. Of a pruned
    family, train them: that takes longer."""
    from anyfit.family import Family
    from anyfit.refinement import refine as refined
    from anyfit.report import summary

    opened = Family.open(family, trust_remote_code=trust_remote_code)
    made = refined(opened, budget, model=model, device=device, memory=memory, progress=to_stderr())
    document = {
        "kept": made.kept,
        "already": made.already,
        "before": made.before.to_json(),
        "after": made.after.to_json(),
        "config": made.point.config.to_json(),
    }
    change = f"{made.before.distance} on the search text {made.before.loss:.3g} before, {made.after.loss:.3g} after"
    outcome = "It was refined before." if made.already else change + ("" if made.kept else ": no better, left as it was")
    return Answer(document, (outcome, summary.described(opened, made.point)))


@command
def extract(
    family: options.FamilyPath,
    budget: options.Budgets,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    force: options.Force = False,
    trust_remote_code: options.RemoteCode = False,
    json_: options.Json = False,
) -> Answer:
    """Write the best model within a budget as an ordinary transformers folder, with decoded weights.

    The budget is that of the family's own target; the folder itself holds floating-point numbers and is larger.
    """
    from anyfit.family import Family
    from anyfit.report import summary

    opened, path = Family.open(family, trust_remote_code=trust_remote_code), output.expanduser()
    point, notes = opened.save(budget, path, force=force), opened.notes_on(budget)
    document = {"path": str(path), "bytes_as_exported": point.bytes_, "bits": point.bits, "config": point.config.to_json()}
    return Answer(
        document | {"notes": list(notes)}, (f"{path}: as exported for {opened.target}, {summary.described(opened, point)}", *notes)
    )


@command
def evaluate(
    subject: Annotated[str, typer.Argument(help="A family (with --budget), a model folder or hub id, or a GGUF file.")],
    budget: options.MaybeBudgets = None,
    data: options.MeasuringData = None,
    against: Annotated[str | None, typer.Option(help="The original, which divergence and agreement are taken to.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Names of lm-eval tasks, `arc_easy,piqa`.")] = None,
    length: options.Length = None,
    segments: options.Segments = None,
    trust_remote_code: options.RemoteCode = False,
    json_: options.Json = False,
) -> Answer:
    """Measure a model on held-out text: perplexity, divergence, agreement, with standard errors."""
    from anyfit import evaluation
    from anyfit.report import summary, tables
    from anyfit.report.listing import listing
    from anyfit.tasks.harness import check_tasks

    if names := _names(tasks):
        check_tasks(names)
    found = evaluation.evaluate(
        subject,
        budget=budget,
        data=data,
        against=against,
        tasks=names,
        length=length,
        segments=segments,
        trust_remote_code=trust_remote_code,
        progress=to_stderr(),
    )
    shown: list[RenderableType] = [f"{found.subject} on {found.text}", tables.quality(found.quality, found.original)]
    shown += [listing(summary.flat(found.tasks), "task", "value")] if found.tasks else []
    return Answer(found.to_json(), tuple(shown))


@command
def measure(
    model: options.Model = None,
    target: Annotated[str, typer.Option("--target", help="The runtime to time: see `anyfit targets`.")] = "onnxruntime",
    formats: Annotated[
        list[str] | None,
        typer.Option("--formats", "--format", help="Formats to time, `F32,int4_sym`. Default: as it is, unquantised."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 1,
    sequence: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 128,
    phase: Annotated[
        str, typer.Option(help="prefill: all tokens at once. decode: the one after them, so that a budget of 20ms is 20 ms a token.")
    ] = "prefill",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one for each core.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write.")] = Path("latency.json"),
    force: options.Force = False,
    trust_remote_code: options.RemoteCode = False,
    log_json: options.LogJson = False,
    json_: options.Json = False,
) -> Answer:
    """Time a network and its modules at every size in a target's runtime: a table for this device, and only for it."""
    wanted, path = _names(formats), output.expanduser()
    _require_known(all_targets, [target])
    _require_known(all_formats, wanted or [])
    refuse_existing(path, force=force)
    from anyfit.measuring import measure as measured
    from anyfit.report.listing import listing

    found = measured(
        model,
        target=target,
        formats=wanted,
        batch=batch,
        sequence=sequence,
        phase=phase,
        threads=threads,
        trust_remote_code=trust_remote_code,
        progress=to_stderr(as_json=log_json),
    )
    found.write(path)
    rows = [("whole network", "", name, f"{ms:.3f}") for name, ms in found.whole.items()]
    rows += [("besides its modules", "", name, f"{found.rest(name):.3f}") for name in found.whole]
    rows += [(kind, str(size), name, f"{ms:.3f}") for (kind, size, name), ms in sorted(found.modules.items(), reverse=True)]
    headline = f"{path}: {found}"
    return Answer(found.to_json(), (headline, listing(rows, "module", "groups or width", "format", "ms")))


@command
def targets(json_: options.Json = False) -> Answer:
    """The runtimes that models are written for."""
    from anyfit.report.listing import listing

    rows = [(name, all_targets.about(name)) for name in all_targets]
    return Answer([{"name": name, "about": about} for name, about in rows], (listing(rows, "target", "about"),))


@command
def recipes(json_: options.Json = False) -> Answer:
    """The methods that make a family."""
    found = [all_recipes.get(name) for name in all_recipes]
    document = [{"name": r.name, "title": r.title, "paper": r.paper, "about": r.about} for r in found]
    return Answer(document, tuple(f"{r.name}: {r.title} ({r.paper})\n{r.about}\n" for r in found))


@command
def searchers(json_: options.Json = False) -> Answer:
    """Who proposes what a family measures. All of them leave the choice to text that they haven't seen."""
    from anyfit.report.listing import listing

    rows = [(name, all_searchers.about(name)) for name in all_searchers]
    return Answer([{"name": name, "about": about} for name, about in rows], (listing(rows, "searcher", "about"),))


@command
def formats(json_: options.Json = False) -> Answer:
    """The ways in which weights are stored, with what they cost and who loads them."""
    from anyfit.report.listing import listing

    loads = {name: all_targets.get(name).formats for name in all_targets}
    found = [(name, all_formats.get(name)) for name in all_formats]
    document: list[dict[str, Any]] = [
        {
            "name": name,
            "bits": f.bits,
            "bytes_per_row": f.overhead,
            "bytes_per_matrix": f.shared,
            "row_multiple": f.block,
            "targets": [t for t in loads if name in loads[t]],
        }
        for name, f in sorted(found, key=lambda pair: (pair[1].bits, pair[0]))
    ]
    rows = [
        (
            d["name"],
            f"{d['bits']:g}",
            str(d["bytes_per_row"] or ""),
            str(d["bytes_per_matrix"] or ""),
            str(d["row_multiple"]),
            ", ".join(d["targets"]),
        )
        for d in document
    ]
    header = ("format", "bits per weight", "and bytes a row", "and a matrix", "rows in multiples of", "loaded by")
    return Answer(document, (listing(rows, *header),))


def _headline(family: Family) -> str:
    original = family.original
    own = original.report.own
    return (
        f"{family.path}: {len(family.frontier)} sizes of {original.name} for {family.target} "
        f"({original.num_parameters:,} parameters, {describe(BYTES, original.bytes_)} as {original.dtype}"
        f"{f', {own[0]} {own[1]}' if own else ''})\n"
    )


def _page(family: Family) -> str:
    return f"\nThe page: {family.path / 'report.html'}"


def _next(family: Family) -> tuple[str, ...]:
    middle = family.frontier[len(family.frontier) // 2]
    suffix = all_targets.get(family.target).suffix
    from anyfit.report import summary

    trusted = " --trust-remote-code" if family.trust_remote_code else ""
    return (f"Next:     anyfit export {family.path} --budget {summary.budget_of(family, middle)} -o {family.name}{suffix}{trusted}",)
