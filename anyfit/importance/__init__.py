"""Ways to say which structures of a matrix matter, and which of its single weights. One line each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyfit.core.registry import Registry

if TYPE_CHECKING:
    from anyfit.importance.base import Importance, NetworkImportance
    from anyfit.importance.sparsity import Saliency

importances: Registry[Importance | NetworkImportance] = Registry(
    "importance",
    {
        "obs": "anyfit.importance.obs:IMPORTANCE",
        "magnitude": "anyfit.importance.magnitude:IMPORTANCE",
        "magnitude_repaired": "anyfit.importance.magnitude:REPAIRED",
        "wanda": "anyfit.importance.wanda:IMPORTANCE",
        "wanda_repaired": "anyfit.importance.wanda:REPAIRED",
        "taylor": "anyfit.importance.taylor:IMPORTANCE",
        "taylor_repaired": "anyfit.importance.taylor:REPAIRED",
        "trajectory": "anyfit.importance.trajectory:IMPORTANCE",
    },
)

saliencies: Registry[Saliency] = Registry(
    "saliency",
    {
        "magnitude": "anyfit.importance.sparsity:MAGNITUDE",
        "wanda": "anyfit.importance.sparsity:WANDA",
        "random": "anyfit.importance.sparsity:CHANCE",
    },
)
