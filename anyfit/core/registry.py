"""Names to implementations, imported only when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Generic, TypeVar, cast

from anyfit.core.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """One kind of part: `entries` maps a name to `"module:attribute"`, one line a part.

    The attribute is the part itself. It is imported at the first `get`, so that listing the names costs
    nothing and an optional runtime is only needed by who uses it.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def get(self, name: str) -> T:
        """The part of that name. Raises `UnknownNameError`, which lists the known names."""
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        module, _, attribute = self._entries[name].partition(":")
        return cast(T, getattr(import_module(module), attribute))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
