"""Ways to find the best config within a budget. One line a searcher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyfit.core.registry import Registry

if TYPE_CHECKING:
    from anyfit.searchers.base import Searcher

searchers: Registry[Searcher] = Registry(
    "searcher",
    {
        "exact": "anyfit.searchers.exact:SEARCHER",
        "evolution": "anyfit.searchers.evolution:SEARCHER",
        "correlation": "anyfit.searchers.correlation:SEARCHER",
        "layer-weights": "anyfit.searchers.layer_weights:SEARCHER",
    },
)
