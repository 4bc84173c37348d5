"""The embedded default's text: the source code of the Python standard library that runs this process.

It is on every machine that has Python, so nothing is downloaded. Modules are split once and for all by a
hash of their path: training, search (choosing between configs) and report (the published figures) never
share a module, whatever Python version reads them.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

SPLITS = ("train", "search", "report")
LARGEST_MODULE_BYTES = 300_000
"""Longer modules are tables (encodings, pydoc topics), not code that anyone writes."""
_LEFT_OUT = ("lib2to3/tests", "test/encoded_modules", "test/test_lib2to3")


def split_of(name: str) -> str:
    """The split that the module at `name` (a path relative to the standard library) belongs to."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "search" if bucket >= 97 else "report" if bucket >= 94 else "train"


def modules(split: str, root: Path | None = None) -> list[str]:
    """Sources of the standard library's modules in one split, ordered by path.

    The held-out splits hold library code only: the library's own tests repeat themselves too much to
    measure with.
    """
    assert split in SPLITS, split
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "dist-packages" in name or name.startswith(_LEFT_OUT):
            continue
        if split_of(name) != split or (split != "train" and "test" in name):
            continue
        if path.stat().st_size <= LARGEST_MODULE_BYTES:
            texts.append(path.read_text(encoding="utf-8", errors="ignore"))
    return texts
