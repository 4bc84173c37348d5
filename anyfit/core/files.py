"""Nothing is ever half-written under its final name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anyfit.core.errors import OutputError

PARTIAL = ".partial"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, a file or a folder; it takes the final name when the block ends well.

    When the block fails, what was written goes away and `path` is as it was. What `path` held before is
    replaced: whether that is allowed is the caller's to ask first (`refuse_existing`). Raises `OutputError`
    for a full disk or a place that can't be written.
    """
    aside = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(aside)
        yield aside
        _sync(aside)
        replace(aside, path)
    except OSError as error:
        remove(aside)
        raise output_error(error, path) from error
    except BaseException:
        remove(aside)
        raise


def replace(new: Path, final: Path) -> None:
    """Rename `new` to `final`; a folder already there is moved away first, so that no name is ever half old."""
    if final.is_dir() and not final.is_symlink():
        old = final.with_name(final.name + ".replaced")
        remove(old)
        final.rename(old)
        new.rename(final)
        remove(old)
    else:
        os.replace(new, final)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raises `OutputError` where writing `path` would overwrite something, or can't be done at all."""
    if path.exists() and not force:
        raise OutputError(f"{path} exists.", remedy="Name another output, or say --force to replace it.")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise OutputError(f"{path} can't be written: {parent} is a file.", remedy="Name an output inside a folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} can't be written: no permission in {parent}.", remedy="Name an output in a folder of yours.")


def output_error(error: OSError, path: Path) -> OutputError:
    """The user's view of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"The disk is full: {path} could not be written.", remedy="Make room, then run the same command again.")
    return OutputError(f"{path} can't be written: {error.strerror or error}.", remedy="Name an output in a folder that you can write to.")


def write_json(path: Path, data: Any) -> None:
    """Readable, sorted, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any | None:
    """The content of a file that `write_json` wrote; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def sha256(path: Path) -> str:
    """Hash of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the content on disk before the name says that it is there."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
