"""A config: one choice for every decision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

FORMAT = "format"
"""The axis on which each unit is given a storage format."""
HEADS, WIDTH = "heads", "width"
"""Those on which attention keeps some of its groups of heads, and a feed-forward some of its channels."""
SPARSITY = "sparsity"
"""That on which a matrix keeps some of its weights, and zeros take the others' places."""


def format_of(choice: str) -> str:
    """The format in the name of a choice: all of it, or what stands behind the size of an attention or a feed-forward."""
    return choice.rpartition(" ")[2]


class Config(Mapping[tuple[str, str], str]):
    """An immutable, hashable map from (unit, axis) to the chosen option's name.

    >>> config = Config.of_formats({"lm_head": "Q6_K"})
    >>> config["lm_head", "format"]
    'Q6_K'
    """

    __slots__ = ("_choices", "_hash")

    def __init__(self, choices: Mapping[tuple[str, str], str]) -> None:
        self._choices = dict(sorted(choices.items()))
        self._hash = hash(tuple(self._choices.items()))

    @classmethod
    def of_formats(cls, formats: Mapping[str, str]) -> Config:
        return cls({(unit, FORMAT): name for unit, name in formats.items()})

    def __getitem__(self, key: tuple[str, str]) -> str:
        return self._choices[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Config({self.digest}, {len(self)} decisions)"

    def format(self, unit: str) -> str:
        return self._choices[unit, FORMAT]

    @property
    def chosen(self) -> dict[str, str]:
        """The choice of every unit."""
        return {unit: name for (unit, _), name in self._choices.items()}

    @property
    def formats(self) -> dict[str, str]:
        """The format of every unit."""
        return {unit: format_of(name) for (unit, _), name in self._choices.items()}

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name this config in tables and file names, in any process."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, dict[str, str]]:
        """Readable JSON: {axis: {unit: choice}}."""
        axes: dict[str, dict[str, str]] = {}
        for (unit, axis), name in self._choices.items():
            axes.setdefault(axis, {})[unit] = name
        return axes

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, Any]]) -> Config:
        return cls({(unit, axis): str(name) for axis, units in data.items() for unit, name in units.items()})
