"""Ways to say which structures of a matrix matter. One line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyfit.core.registry import Registry

if TYPE_CHECKING:
    from anyfit.importance.base import Importance

importances: Registry[Importance] = Registry(
    "importance",
    {
        "obs": "anyfit.importance.obs:IMPORTANCE",
        "magnitude": "anyfit.importance.magnitude:IMPORTANCE",
        "magnitude_repaired": "anyfit.importance.magnitude:REPAIRED",
        "wanda": "anyfit.importance.wanda:IMPORTANCE",
        "wanda_repaired": "anyfit.importance.wanda:REPAIRED",
    },
)
