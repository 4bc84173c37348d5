"""How much time a fit may take."""

from __future__ import annotations

from enum import StrEnum

from anyfit.core.errors import UserError


class Effort(StrEnum):
    """Three words and no more knobs: each does all that the one before does.

    Low: the target's quick formats, chosen exactly by the additive scores. Normal: also its slow formats, which are the
    best of their sizes. High: also evolution around the smallest finalists, which are then refined, unless they are
    pruned or masked.
    """

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @classmethod
    def parse(cls, text: str) -> Effort:
        """Raises `UserError` for another word."""
        if text not in list(cls):
            raise UserError(f"There is no effort {text!r}.", remedy=f"Say one of: {', '.join(cls)}.")
        return cls(text)

    @property
    def slow_formats(self) -> bool:
        return self is not Effort.LOW

    @property
    def refines(self) -> bool:
        return self is Effort.HIGH
