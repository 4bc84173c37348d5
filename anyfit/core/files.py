"""Nothing is ever half-written under its final name."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anyfit.core.errors import OutputError

PARTIAL = ".partial"


@contextmanager
def written_aside(path: Path, *, force: bool = True) -> Iterator[Path]:
    """A hidden path beside `path` to write to, a file or a folder; it takes the final name when the block ends well.

    When the block fails, what was written goes away and `path` is as it was. What `path` held before is replaced,
    unless it appeared in the meantime and `force` is off. What a killed process left is removed. Raises
    `OutputError` for a full disk or a place that can't be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        yield aside
        _sync(aside)
        if not force and path.exists():
            raise OutputError(f"{path} appeared while it was being made.", remedy="Name another output, or say --force to replace it.")
        replace(aside, path)
    except OSError as error:
        remove(aside)
        raise output_error(error, path) from error
    except Exception as error:
        remove(aside)
        if cause := _system_error(error):
            raise output_error(cause, path) from error
        raise
    except BaseException:
        remove(aside)
        raise


def _remove_stale(path: Path) -> None:
    """What processes that are gone left of writing `path`; another's that is at it stays."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        owner = aside.name.removesuffix(PARTIAL).rpartition(".")[2]
        if owner == str(os.getpid()) or not _alive(owner):
            remove(aside)


def _alive(process: str) -> bool:
    return process.isdecimal() and Path("/proc", process).exists() if Path("/proc").is_dir() else True


def _system_error(error: Exception) -> OSError | None:
    """The system's own error in what a library written in Rust made of it."""
    code = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


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


def refuse_existing(path: Path, *, force: bool, ours: Callable[[Path], bool] = Path.is_file, inputs: Iterable[Path] = ()) -> None:
    """Raises `OutputError` where writing `path` would overwrite something it shouldn't, or can't be done at all.

    With `force`, what is `ours` may be replaced (by default: a file), but never an input or a folder that holds one.
    """
    final = path.resolve()
    for given in inputs:
        if given.exists() and final in (given.resolve(), *given.resolve().parents):
            raise OutputError(f"{path} is, or holds, {given}, which is read.", remedy="Name another output.")
    if (path.exists() or path.is_symlink()) and not force:
        raise OutputError(f"{path} exists.", remedy="Name another output, or say --force to replace it.")
    if path.is_symlink() or (path.exists() and not ours(path) and not _is_empty(path)):
        raise OutputError(f"{path} exists and isn't something like what would take its place.", remedy="Name another output, or remove it.")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise OutputError(f"{path} can't be written: {parent} is a file.", remedy="Name an output inside a folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} can't be written: no permission in {parent}.", remedy="Name an output in a folder of yours.")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def is_full(error: Exception) -> bool:
    """Whether an error says that a disk is full."""
    if not isinstance(error, OSError):
        return False
    # numpy tells a short write in words, without a number.
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "requested and" in str(error))


def output_error(error: OSError, path: Path) -> OutputError:
    """The user's view of a failed write."""
    if is_full(error):
        return OutputError(f"The disk is full: {path} could not be written.", remedy="Make room, then run the same command again.")
    return OutputError(f"{path} can't be written: {error.strerror or error}.", remedy="Name an output in a folder that you can write to.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time is in here for the same folder; others wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
