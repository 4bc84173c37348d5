"""What mixing formats brings at equal bytes: each row the one before and one part more."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from peers.subjects import LENGTH, Subject
from table import Row, Section

from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.effort import Effort
from anyfit.core.space import Space
from anyfit.family.store import Store, stored_matrices
from anyfit.finalists import EXACT, Finalists
from anyfit.pipeline import Fit, Settings
from anyfit.progress import Silent
from anyfit.searchers.evolution import SEARCHER
from anyfit.searchers.exact import Solver
from anyfit.targets import targets
from anyfit.tasks.language import Reference, kl

EVERYWHERE = ("Q3_K", "Q4_K")
"""Formats whose size, when all matrices are in them, is the budget."""
UNIFORM = "one format everywhere, the embedding too"
BLOCKS, EMBEDDING, EVOLVED, REFINED = (
    "+ bits shared out among the blocks' matrices, exactly",
    "+ the embedding and the head shared in",
    "+ evolution, where the search split prefers it",
    "+ refining",
)


def configs(space: Space, finalists: Finalists, format_: str) -> Iterator[tuple[str, Config]]:
    """Each part's config within the bytes of `format_` everywhere."""
    uniform = space.uniform(format_)
    size = space.bytes_(uniform)
    budget = Budget((("bytes", float(size)),), f"{size} B")
    yield UNIFORM, uniform
    fixed = [
        d if d.unit.weights[0].block is not None else replace(d, choices=tuple(c for c in d.choices if c.name == uniform[d.key]))
        for d in space.decisions
    ]
    yield BLOCKS, Solver(replace(space, decisions=tuple(fixed)), finalists.table).solve(budget)
    exact = Solver(space, finalists.table).solve(budget)
    yield EMBEDDING, exact
    # As in the product: the search split, which evolution hasn't seen, decides.
    (evolved,) = SEARCHER.search(finalists.subject, [budget])
    yield EVOLVED, min((exact, evolved), key=lambda config: _searched(finalists, config))


def _searched(finalists: Finalists, config: Config) -> float:
    quality = finalists.point(config).search
    assert quality is not None
    return quality.loss


def section(subject: Subject) -> Section:
    """All of a network's matrices in the target's quick formats, encoded once."""
    header = ("size of", "row", "bits", "bits of the embedding", "KL", "change from the row before")
    target, text, rows = targets.get("llama.cpp"), subject.segments, []
    counts = (len(text.calibration), len(text.search), len(text.report))
    settings = Settings(target.name, target.menu(Effort.LOW), "gptq", LENGTH, *counts, 0, Effort.HIGH)
    fit = Fit(subject.checkpoint, text, settings, Silent())
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        fit.encode(store)
        network, references = fit.elastic_model(store), [Reference.of(fit.model, segment[None]) for segment in text.report]
        texts = {"search": text.search, "report": text.report}
        finalists = Finalists(
            store, fit.score(store), fit.elastic(store), lambda: network, texts, text.calibration, settings.effort, EXACT, Silent()
        )
        refinery = fit._refinery(finalists.references["search"])
        for format_ in EVERYWHERE:
            before = config = None
            for name, config in configs(fit.space, finalists, format_):
                model = network.set(config)
                now = np.array([kl(model, reference) for reference in references])
                rows.append(_row(fit.space, (format_, name), config, now, before))
                before = now
            assert config is not None
            with network.lent(config) as model:
                matrices = stored_matrices(store.variant, fit.space, config, target, fit.source)
                refinery.refine(model, matrices, Silent())
                now = np.array([kl(model, reference) for reference in references])
            rows.append(_row(fit.space, (format_, REFINED), config, now, before))
    remark = (
        f"The formats are {', '.join(settings.formats)}; all rows of one size have at most the bytes of that format everywhere. "
        "A row holds where it isn't worse than the one before by more than the error of the paired difference."
    )
    return Section(f"{subject.name}: from one format to the refined mix", header, rows, (remark,))


def _row(space: Space, names: tuple[str, str], config: Config, now: np.ndarray, before: np.ndarray | None) -> Row:
    table = next(d for d in space.decisions if d.unit.weights[0].role == "embedding")
    bits = 8 * next(c.stored_bytes for c in table.choices if c.name == config[table.key]) / table.unit.num_weights
    error = now.std(ddof=1) / np.sqrt(len(now))
    change, doubt = (0.0, 0.0)
    if before is not None:
        change = float(now.mean() / before.mean() - 1)
        doubt = float((now - before).std(ddof=1) / np.sqrt(len(now)) / before.mean())
    cells = (
        *names,
        f"{space.bits(config):.3f}",
        f"{bits:.2f}",
        f"{now.mean():.5f} ± {error:.5f}",
        "" if before is None else f"{change:+.1%} ± {doubt:.1%}",
    )
    print("  ".join(cells), flush=True)
    return Row(cells, holds=None if before is None else change <= doubt)
