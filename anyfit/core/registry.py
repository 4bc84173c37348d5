"""Names to implementations, imported only when asked for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
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

    def about(self, name: str) -> str:
        """The first line of what the part's module says of itself, read without importing it."""
        module = self._entries[name].partition(":")[0]
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None, module
        docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
        assert docstring is not None, f"{module} has no docstring"
        return docstring.partition("\n")[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
