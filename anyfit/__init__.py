"""anyfit: train once, fit any budget.

One network goes in; one run later there is a family, from which the best model for any budget is taken in
seconds and written for the runtime where people run it.

>>> import anyfit
>>> family = anyfit.fit("path-or-hub-id", data="notes.txt", target="llama.cpp")     # doctest: +SKIP
>>> family.export("1.5GB", "smol.gguf")                                             # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyfit.api import fit as fit
    from anyfit.api import plan as plan
    from anyfit.core.budget import Budget as Budget
    from anyfit.core.errors import UserError as UserError
    from anyfit.evaluation import evaluate as evaluate
    from anyfit.family.family import Family as Family
    from anyfit.measuring import measure as measure
    from anyfit.refinement import refine as refine

_HOMES = {
    "fit": "anyfit.api",
    "plan": "anyfit.api",
    "evaluate": "anyfit.evaluation",
    "measure": "anyfit.measuring",
    "refine": "anyfit.refinement",
    "Family": "anyfit.family.family",
    "Budget": "anyfit.core.budget",
    "UserError": "anyfit.core.errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch takes a second that `anyfit --help` doesn't have."""
    if name not in _HOMES:
        raise AttributeError(f"module 'anyfit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
