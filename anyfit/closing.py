"""The last stage of a fit: what exports will need is kept, and the journal becomes a family."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace

from anyfit.calibration.data import PURPOSES, Segments
from anyfit.checkpoint import Checkpoint, Source
from anyfit.core.files import remove, sha256, write_json, written_aside
from anyfit.core.space import Space
from anyfit.encoding import COMPARED
from anyfit.family.family import Family, with_points
from anyfit.family.journal import Journal
from anyfit.family.manifest import NAME, Manifest, Point
from anyfit.family.store import PASSTHROUGH, REFINED, SOURCE, TEXT, VARIANTS, Store
from anyfit.formats.nested import held
from anyfit.report.page import write as write_page
from anyfit.scores.table import Table


def keep_source(store: Store, checkpoint: Checkpoint, source: Source, segments: Segments) -> None:
    """What exports need of the original, and the tokens of all three splits."""
    folder = store.folder / SOURCE
    folder.mkdir(exist_ok=True)
    for file in checkpoint.travelling_files():
        with written_aside(folder / file.name) as aside:
            shutil.copyfile(file, aside)
    store.write_tensors(PASSTHROUGH, source.passthrough)
    kept = {name: getattr(segments, name) for name in PURPOSES}
    store.write_tensors(TEXT, {name: own if own.is_floating_point() else own.int() for name, own in kept.items()})


def close(journal: Journal, manifest: Manifest, leftovers: Iterable[str]) -> None:
    """Hash every file, write the manifest and the page, and give the family its name. `leftovers`: what of the journal doesn't stay."""
    for partial in list(journal.folder.rglob("*.partial")):  # of a process that was killed; nobody else writes here
        remove(partial)
    parts = [journal.folder / part for part in (VARIANTS, SOURCE, REFINED)]
    files = sorted(path for part in parts if part.is_dir() for path in part.iterdir())
    files += [journal.folder / name for name in (PASSTHROUGH, TEXT)]
    hashes = {p.relative_to(journal.folder).as_posix(): sha256(p) for p in files}
    manifest = with_points(manifest, manifest.points, hashes)
    write_json(journal.folder / NAME, manifest.to_json())
    write_page(Family(journal.folder, manifest), journal.folder / "report.html")
    for name in leftovers:
        remove(journal.folder / name)
    journal.finish()


def nesting(space: Space, store: Store, table: Table, points: Iterable[Point]) -> list[str]:
    """What is to be known of tables that hold others: what each size loses, and what it would by itself."""
    within = held(space.formats())
    names = sorted({*within, *within.values()})
    if not names:
        return []
    errors = {d.unit.name: [store.errors(weight.name) | store.alone(weight.name) for weight in d.unit.weights] for d in space.decisions}
    own = {d.unit.name: {c.name: sum(row[c.name] for row in errors[d.unit.name]) for c in d.choices} for d in space.decisions}
    found = [f"{', '.join(names)}: nested, of each matrix the finest is stored alone, whose upper bits are the others"]
    for name in names:
        config = space.uniform(name)
        nested, alone = (entry.predict(space, config) for entry in (table, replace(table, errors=own)))
        point, part = next(point for point in points if point.config == config), alone / nested if nested else 1.0
        assert point.search is not None
        found.append(
            f"{name}: nested, {point.search.distance} {point.plain_loss:.4g} on held-out text; tables of this size alone would have about "
            f"{part * point.plain_loss:.4g}, as their outputs' errors are {part:.2f} of these (one row in {COMPARED})"
        )
    return found
