"""Ways to find how much each unit's error matters. One line a score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyfit.core.registry import Registry

if TYPE_CHECKING:
    from anyfit.scores.base import Sensitivity

sensitivities: Registry[Sensitivity] = Registry(
    "score",
    {
        "kl": "anyfit.scores.kl:SENSITIVITY",
        "fisher": "anyfit.scores.fisher:SENSITIVITY",
    },
)
