"""The contract of a recipe: a published method as a short composition of parts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Names of the parts that `fit` puts together, and what a person should know before choosing it."""

    name: str
    title: str
    paper: str
    about: str
    """What it does and when to choose it, in one paragraph."""
    quantizer: str
    score: str
