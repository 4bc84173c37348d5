"""How well the additive scores predict what configs are then measured to lose.

Random configs of the embedded default: every unit draws its format by itself. Each score's prediction is
compared with the measured KL by rank correlation; the report split is used, which no score has seen.

    python benchmarks/scores.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from table import Row, finish

from anyfit.api import prepare
from anyfit.core.config import Config
from anyfit.core.space import Space
from anyfit.family.store import Store
from anyfit.pipeline import NUM_PROBE_SEGMENTS
from anyfit.progress import Silent
from anyfit.scores import sensitivities
from anyfit.scores.kl import MeasuredKL
from anyfit.scores.table import Table
from anyfit.tasks.language import Reference, kl

NUM_CONFIGS = 40
LOWEST_CORRELATION = 0.9


def random_configs(space: Space, rng: np.random.Generator) -> list[Config]:
    """Half of them draw every format alike; the other half lean to large or to small ones by a random amount."""
    configs = []
    for i in range(NUM_CONFIGS):
        tilt = 0.0 if i % 2 else rng.normal(0, 0.7)
        chosen = {}
        for decision in space.decisions:
            bits = np.array([8 * c.stored_bytes / decision.unit.num_weights for c in decision.choices])
            weights = np.exp(tilt * (bits - bits.mean()) / (bits.std() or 1))
            chosen[decision.key] = decision.choices[rng.choice(len(bits), p=weights / weights.sum())].name
        configs.append(Config(chosen))
    return configs


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    fit = prepare()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        fit.encode(store)
        errors = fit.errors(store)
        streamed, probing = fit.elastic(store), fit.segments.search[:NUM_PROBE_SEGMENTS]
        scores = {name: sensitivities.get(name) for name in sensitivities} | {"kl, every block": MeasuredKL(None)}
        tables = {name: Table(score.measure(streamed, probing, errors, Silent()), errors) for name, score in scores.items()}
        elastic = fit.elastic_model(store)
        reference = Reference.of(fit.model, fit.segments.report)
        configs = random_configs(fit.space, np.random.default_rng(0))
        measured = np.array([kl(elastic.set(config), reference) for config in configs])
    rows = []
    for name, table in tables.items():
        predicted = np.array([table.predict(fit.space, config) for config in configs])
        for which, part in (("all", slice(None)), ("drawn alike", slice(1, None, 2)), ("leaning", slice(0, None, 2))):
            correlation = spearmanr(predicted[part], measured[part]).statistic
            log_ratio = np.log(measured[part] / predicted[part])
            cells = (
                name,
                which,
                str(len(measured[part])),
                f"{correlation:.3f}",
                f"{np.exp(np.median(log_ratio)):.2f}",
                f"{np.exp(log_ratio.std()):.2f}",
            )
            claimed = name == fit.recipe.score and which != "leaning"
            rows.append(Row(cells, holds=bool(correlation >= LOWEST_CORRELATION) if claimed else None))
    remarks = (
        f"{NUM_CONFIGS} random configs, measured KL from {measured.min():.4f} to {measured.max():.4f} nats per token. "
        f"The score that fit uses must reach a rank correlation of {LOWEST_CORRELATION} over all of them and over those that draw all "
        "formats alike.",
    )
    header = ("score", "configs", "number", "rank correlation", "measured / predicted (median)", "spread (factor)")
    return finish("scores", "Predicted against measured divergence", "make bench-scores", header, rows, remarks)


if __name__ == "__main__":
    sys.exit(main())
