"""A family that nobody fitted: plausible figures from a formula, for tests of what is done with a finished one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.files import write_json
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.family import Family, Point
from anyfit.family.manifest import NAME, Manifest, Original
from anyfit.scores.table import Table
from anyfit.searchers.exact import solve
from anyfit.tasks.language import Quality

BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q6_K": 6.5625, "Q8_0": 8.5}
ROLES = {"q": (256, 256), "k": (128, 256), "v": (128, 256), "o": (256, 256), "gate": (768, 256), "up": (768, 256), "down": (256, 768)}
NUM_BLOCKS = 6
FIXED_BYTES = 90_000


def quality(kl: float) -> Quality:
    """Figures that go with a mean divergence of `kl`."""
    return Quality(
        perplexity=14.5 * float(np.exp(kl)),
        perplexity_stderr=0.31,
        kl_mean=kl,
        kl_stderr=0.04 * kl,
        kl_median=0.4 * kl,
        kl_p99=11 * kl,
        top1=1 / (1 + kl**0.5),
        top1_stderr=0.002,
        num_tokens=16384,
        num_segments=64,
    )


def space() -> Space:
    """Six blocks of a small Llama and its tied embedding; one row length refuses Q2_K."""
    weights = [Weight("model.embed_tokens.weight", (2048, 256), "embedding", "head")]
    weights += [
        Weight(f"model.layers.{block}.{role}_proj.weight", shape, role, f"{block}.{role}", block)
        for block in range(NUM_BLOCKS)
        for role, shape in ROLES.items()
    ]
    decisions = []
    for weight in weights:
        sizes = {name: int(weight.num_weights * bits / 8) for name, bits in BITS.items()}
        refused = {"Q2_K": "row length 768 is not a multiple of 512"} if weight.role == "down" else {}
        choices = tuple(Choice(name, size, size) for name, size in sizes.items() if name not in refused)
        decisions.append(Decision(Unit(weight.name.removesuffix(".weight"), (weight,)), choices, refused=refused))
    return Space(tuple(decisions), FIXED_BYTES, 12_000, sum(w.num_weights for w in weights) + 6_000)


def table(made: Space) -> Table:
    """Sensitivities that differ a hundredfold between units, errors that fall fourfold with each bit."""
    sensitivity = {d.unit.name: 10 ** (index * 7 % 5 / 2 - 1) for index, d in enumerate(made.decisions)}
    errors = {d.unit.name: {c.name: 0.05 * 4 ** -BITS[c.name] * d.unit.num_weights / 65536 for c in d.choices} for d in made.decisions}
    return Table(sensitivity, errors)


def points(made: Space, scores: Table, lossless_below: float) -> tuple[Point, ...]:
    """Optima at a dozen sizes and every uniform setting, measured to be a little off their prediction.

    A config that is predicted below `lossless_below` is measured to be the original itself.
    """
    low, high = made.bytes_(made.smallest()), made.bytes_(made.largest())
    configs: dict[Config, str | None] = {
        solve(made, scores, Budget((("bytes", float(size)),), "")): None for size in np.geomspace(low, high, 12)
    }
    configs |= {config: name for name in made.formats() if (config := made.uniform(name))}
    found = []
    for index, (config, uniform) in enumerate(configs.items()):
        predicted = scores.predict(made, config)
        off = 0.0 if predicted < lossless_below else 1.05 if index % 2 else 0.97
        measured = quality(predicted * off)
        found.append(Point(config, made.bytes_(config), made.bits(config), predicted, uniform, measured, measured))
    return tuple(found)


def made_family(path: Path, name: str = "org/tiny-llama", *, lossless_below: float = 0.0) -> Family:
    """A family written to `path`: its manifest only, so there is nothing to export."""
    made = space()
    scores = table(made)
    manifest = Manifest(
        target="llama.cpp",
        recipe="gptq",
        space=made,
        table=scores,
        points=points(made, scores, lossless_below),
        original=Original(name, 9_000_000, made.num_parameters, "bfloat16", "0" * 64, False, quality(0.0), quality(0.0)),
        coverage=tuple((d.unit.name, format_, reason) for d in made.decisions for format_, reason in d.refused.items()),
        notes=("model.layers.3.down_proj.weight: damping was raised to 0.1",),
        provenance={"anyfit": "0.1.0", "seed": 0, "versions": {"torch": "2.13.0"}},
        tied={},
        trust_remote_code=False,
    )
    path.mkdir(parents=True)
    write_json(path / NAME, manifest.to_json())
    return Family.open(path)
