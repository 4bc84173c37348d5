"""What is read where nothing was said: which text, how much, in segments of which length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from anyfit.calibration.generated import SELF
from anyfit.core.errors import UserError
from anyfit.interface import interface_of
from anyfit.zoo import DATA

NUM_REPORT = 32
"""Segments that figures are reported of."""
LONGEST_SEGMENT = 2048

Data = str | Path | Sequence[str | Path] | None


def usual(data: Data, *, embedded: bool) -> str | Path | Sequence[str | Path]:
    """What was named, or else the embedded default's own text; for other networks what they write themselves."""
    if data is not None:
        return data
    return DATA if embedded else SELF


def segment_length(length: int | None, config: PretrainedConfig, longest: int) -> int:
    """As given, if the network reads such segments, or else its context, `longest` at most. Raises `UserError` for one that it doesn't."""
    if (only := interface_of(config).length(config)) is not None:
        if length not in (None, only):
            raise UserError(f"This network reads {only} positions, not {length}.", remedy="Leave out --length.")
        return only
    context = int(getattr(config, "max_position_embeddings", longest))
    if length is None:
        return min(longest, context)
    if not 2 <= length <= context:
        raise UserError(
            f"Segments of {length} tokens don't work with a context of {context}.", remedy=f"Give a length from 2 to {context}."
        )
    return length
