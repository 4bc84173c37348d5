"""What a family says of itself: `family.json`, read back into plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anyfit.core.config import Config
from anyfit.core.errors import FamilyError
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.scores.table import Table
from anyfit.tasks import quality_from_json
from anyfit.tasks.base import Quality

NAME = "family.json"
VERSION = 1
TIMED_ON = "timed_on"
"""In the provenance of a family that knows milliseconds: the device that they were measured on."""


@dataclass(frozen=True)
class Point:
    """One config with its exact costs, its predicted loss, and what was measured of it.

    `uniform` is the setting's name where every unit has the same format. `search` is the quality on the split
    that configs are chosen by, `report` on the split that nothing was chosen by; None where not measured. `unrefined`:
    where the config has matrices of its own, solved again for each other, the loss on the search split before.
    """

    config: Config
    bytes_: int
    bits: float
    predicted: float
    uniform: str | None = None
    search: Quality | None = None
    report: Quality | None = None
    unrefined: float | None = None

    @property
    def refined(self) -> bool:
        return self.unrefined is not None

    @property
    def plain_loss(self) -> float:
        """The loss on the search split of the variants that a measured config is made of, before any refining."""
        assert self.search is not None
        return self.search.loss if self.unrefined is None else self.unrefined


@dataclass(frozen=True)
class Original:
    """The network that went in."""

    name: str
    bytes_: int
    num_parameters: int
    dtype: str
    digest: str
    embedded: bool
    search: Quality
    report: Quality


@dataclass(frozen=True)
class Manifest:
    """Everything about a family but its numbers. Holds no time, no path, nothing of the machine."""

    target: str
    recipe: str
    space: Space
    table: Table
    points: tuple[Point, ...]
    original: Original
    coverage: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]
    tied: Mapping[str, str]
    trust_remote_code: bool
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Content hash of the whole family: of this manifest, which holds the hash of every other file."""
        return _digest(self._content())

    def to_json(self) -> dict[str, Any]:
        return {**self._content(), "digest": self.digest}

    def _content(self) -> dict[str, Any]:
        return {
            "anyfit": "family",
            "version": VERSION,
            "target": self.target,
            "recipe": self.recipe,
            "space": _space_to_json(self.space),
            "table": {"sensitivity": dict(self.table.sensitivity), "errors": {u: dict(row) for u, row in self.table.errors.items()}},
            "points": [_point_to_json(point) for point in self.points],
            "original": {**asdict(self.original), "search": self.original.search.to_json(), "report": self.original.report.to_json()},
            "coverage": [list(row) for row in self.coverage],
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
            "tied": dict(self.tied),
            "trust_remote_code": self.trust_remote_code,
            "files": dict(self.files),
        }

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises `FamilyError` where `folder` is no family, was made by a newer version, or was altered."""
        data = _read(folder)
        return cls(
            target=data["target"],
            recipe=data["recipe"],
            space=_space_from_json(data["space"]),
            table=Table(data["table"]["sensitivity"], data["table"]["errors"]),
            points=tuple(_point_from_json(point) for point in data["points"]),
            original=Original(**{**data["original"], **{k: quality_from_json(data["original"][k]) for k in ("search", "report")}}),
            coverage=tuple((row[0], row[1], row[2]) for row in data["coverage"]),
            notes=tuple(data["notes"]),
            provenance=data["provenance"],
            tied=data["tied"],
            trust_remote_code=data["trust_remote_code"],
            files=data["files"],
        )


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not folder.is_dir():
        raise FamilyError(f"There is no family at {folder}.", remedy="Make one with: anyfit fit MODEL -o NAME.family.")
    if not path.is_file():
        raise FamilyError(f"{folder} is no family: it has no {NAME}.", remedy="Name the folder that anyfit fit wrote.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FamilyError(f"{path} can't be read: {error}.", remedy="Fit the family again.") from error
    if not isinstance(data, dict) or data.get("anyfit") != "family":
        raise FamilyError(f"{path} doesn't describe a family.", remedy="Name the folder that anyfit fit wrote.")
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise FamilyError(
            f"{folder} was made by a newer anyfit (family version {version}; this one reads up to {VERSION}).",
            remedy="Update anyfit.",
        )
    if _digest({name: value for name, value in data.items() if name != "digest"}) != data.get("digest"):
        raise FamilyError(f"{path} was altered: its content doesn't match its own hash.", remedy="Restore it, or fit the family again.")
    return data


def _space_to_json(space: Space) -> dict[str, Any]:
    return {
        "fixed_bytes": space.fixed_bytes,
        "fixed_stored_bytes": space.fixed_stored_bytes,
        "num_parameters": space.num_parameters,
        "others": dict(space.others),
        "decisions": [
            {
                "unit": d.unit.name,
                "axis": d.axis,
                "weights": [asdict(weight) for weight in d.unit.weights],
                "choices": [[c.name, c.bytes_, c.stored_bytes, dict(c.others)] for c in d.choices],
                "refused": dict(d.refused),
            }
            for d in space.decisions
        ],
    }


def _space_from_json(data: Mapping[str, Any]) -> Space:
    decisions = tuple(
        Decision(
            unit=Unit(d["unit"], tuple(Weight(**{**w, "shape": tuple(w["shape"]), "tied": tuple(w["tied"])}) for w in d["weights"])),
            choices=tuple(Choice(*choice) for choice in d["choices"]),
            axis=d["axis"],
            refused=d["refused"],
        )
        for d in data["decisions"]
    )
    return Space(decisions, data["fixed_bytes"], data["fixed_stored_bytes"], data["num_parameters"], data["others"])


def _point_to_json(point: Point) -> dict[str, Any]:
    return {
        "config": point.config.to_json(),
        "bytes": point.bytes_,
        "bits": point.bits,
        "predicted": point.predicted,
        "uniform": point.uniform,
        "search": point.search and point.search.to_json(),
        "report": point.report and point.report.to_json(),
        "unrefined": point.unrefined,
    }


def _point_from_json(data: Mapping[str, Any]) -> Point:
    return Point(
        config=Config.from_json(data["config"]),
        bytes_=data["bytes"],
        bits=data["bits"],
        predicted=data["predicted"],
        uniform=data["uniform"],
        search=data["search"] and quality_from_json(data["search"]),
        report=data["report"] and quality_from_json(data["report"]),
        unrefined=data["unrefined"],
    )
