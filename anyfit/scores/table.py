"""Additive scores: what each choice is expected to cost in quality, unit by unit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anyfit.core.config import Config
from anyfit.core.files import write_json
from anyfit.core.space import Space


@dataclass(frozen=True)
class Table:
    """Expected divergence from the original, in nats per token.

    `sensitivity` of a unit times the output `errors` of one of its choices; summed over units.
    """

    sensitivity: Mapping[str, float]
    errors: Mapping[str, Mapping[str, float]]

    def score(self, unit: str, choice: str) -> float:
        return self.sensitivity[unit] * self.errors[unit][choice]

    def predict(self, space: Space, config: Config) -> float:
        """Expected KL of the whole config."""
        return sum(self.score(d.unit.name, config[d.key]) for d in space.decisions)

    def save(self, path: Path) -> None:
        write_json(path, {"sensitivity": dict(self.sensitivity), "errors": {unit: dict(row) for unit, row in self.errors.items()}})

    @classmethod
    def load(cls, path: Path) -> Table:
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(data["sensitivity"], data["errors"])
