"""A run that can be killed: what is finished stays, and the same command goes on from there.

While a family is being made it lives in `NAME.partial`. `journal.json` there says what it is made of; every
other file is written aside and renamed, so that a file that is there is whole. When all is done the folder
takes its final name.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from anyfit.core.errors import FamilyError, OutputError
from anyfit.core.files import PARTIAL, output_error, remove, replace, write_json

NAME, LOCK = "journal.json", ".lock"


class Journal:
    """The folder of one unfinished run."""

    def __init__(self, folder: Path, final: Path, *, force: bool) -> None:
        self.folder = folder
        self.final = final
        self._force = force

    @classmethod
    @contextmanager
    def open(cls, final: Path, key: Mapping[str, Any], *, restart: bool, force: bool) -> Iterator[Journal]:
        """Begin or continue the run that makes `final` out of `key` (model, data, settings: plain JSON).

        Raises `FamilyError` where an unfinished run of something else is there, naming what differs, and
        `OutputError` where another process is at it, or the place can't be written.
        """
        folder = final.with_name(final.name + PARTIAL)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / LOCK).open("a")
        except OSError as error:
            raise output_error(error, final) from error
        with lock:
            _hold(lock, folder, final)
            if restart:
                for path in folder.iterdir():
                    if path.name != LOCK:
                        remove(path)
            _claim(folder, key)
            yield cls(folder, final, force=force)

    @classmethod
    def joined(cls, final: Path) -> Journal:
        """Of a run that another process on this disk has opened."""
        return cls(final.with_name(final.name + PARTIAL), final, force=False)

    def finish(self) -> None:
        """The folder takes its final name; what had this name before is gone, if that was allowed.

        The journal goes last: a run that is killed here still says what it is made of.
        """
        if self.final.exists() and not self._force:
            raise OutputError(
                f"{self.final} appeared while the family was being made.",
                remedy=f"Move it away and run the same command again: what was made waits in {self.folder}.",
            )
        try:
            replace(self.folder, self.final)
        except OSError as error:
            raise output_error(error, self.final) from error
        for name in (NAME, LOCK):
            remove(self.final / name)


def _hold(lock: TextIO, folder: Path, final: Path) -> None:
    """Lock, and see that what is locked is still what lies there: the other may have finished in between."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held, there = os.fstat(lock.fileno()), (folder / LOCK).stat()
    except OSError as error:
        raise OutputError(f"Another process is making {final}.", remedy="Wait for it, or name another output.") from error
    if (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino):
        raise OutputError(f"Another process was making {final} just now.", remedy="Run the same command again.")


def _claim(folder: Path, key: Mapping[str, Any]) -> None:
    path = folder / NAME
    now = json.loads(json.dumps(key))
    if not path.exists():
        found = sorted(p.name for p in folder.iterdir() if p.name != LOCK and not p.name.startswith(f".{NAME}."))
        if found:
            raise FamilyError(
                f"{folder} is in the way: it holds {found[0]} and no {NAME}.", remedy="Move it away, or --restart to empty it."
            )
        write_json(path, now)
        return
    try:
        begun = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise FamilyError(f"{path} can't be read: {error}.", remedy="Say --restart to begin again.") from error
    differs = [name for name in sorted({*begun, *now}) if begun.get(name) != now.get(name)]
    if differs:
        changes = "; ".join(f"{name} was {begun.get(name)!r} and is {now.get(name)!r}" for name in differs)
        raise FamilyError(
            f"The unfinished run in {folder} was made of something else: {changes}.",
            remedy="Say --restart to throw it away, or name another output.",
        )
