"""Everything that a user can do wrong. Our own mistakes are asserts."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """What was given and which rule it breaks, with the remedy as its own sentence.

    The command line prints both and exits with status 2; nothing has been written by then.
    """

    def __init__(self, problem: str, *, remedy: str = "") -> None:
        super().__init__(f"{problem} {remedy}".strip())
        self.problem, self.remedy = problem, remedy


class ModelError(UserError):
    """The model folder can't be used: missing, truncated, not safetensors, NaN in a weight, ..."""


class DataError(UserError):
    """The text can't be used: missing, empty, not UTF-8, shorter than one segment, ..."""


class BudgetError(UserError):
    """The budget can't be read or can't be met."""


class FamilyError(UserError):
    """The family folder can't be used: altered, incomplete, written by a newer version, ..."""


class OutputError(UserError):
    """The place to write to can't be used: it exists, isn't writable, the disk is full, ..."""


class UnknownNameError(UserError):
    """A name that no registry knows; the message lists those that it does."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        super().__init__(f"Unknown {kind} {name!r}.", remedy=f"{hint}Known: {', '.join(known)}.")


class RuntimeMissingError(UserError):
    """An optional runtime is needed for what was asked, and isn't installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed.",
            remedy=f"Install it with: pip install 'anyfit[{extra}]'.",
        )
