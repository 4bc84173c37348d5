"""The artifact on disk."""

from anyfit.family.family import Export, Family
from anyfit.family.manifest import Point

__all__ = ["Export", "Family", "Point"]
