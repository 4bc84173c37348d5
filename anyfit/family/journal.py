"""A run that can be killed: what is finished stays, and the same command goes on from there.

While a family is being made it lives in `NAME.partial`. `journal.json` there says what it is made of; every
other file is written aside and renamed, so that a file that is there is whole. When all is done the folder
takes its final name.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anyfit.core.errors import FamilyError, OutputError
from anyfit.core.files import PARTIAL, output_error, remove, replace, write_json

NAME = "journal.json"


class Journal:
    """The folder of one unfinished run."""

    def __init__(self, folder: Path, final: Path) -> None:
        self.folder = folder
        self.final = final

    @classmethod
    @contextmanager
    def open(cls, final: Path, key: Mapping[str, Any], *, restart: bool) -> Iterator[Journal]:
        """Begin or continue the run that makes `final` out of `key` (model, data, settings: plain JSON).

        Raises `FamilyError` where an unfinished run of something else is there, naming what differs, and
        `OutputError` where another process is at it, or the place can't be written.
        """
        folder = final.with_name(final.name + PARTIAL)
        if restart:
            remove(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("w")
        except OSError as error:
            raise output_error(error, final) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(f"Another process is making {final}.", remedy="Wait for it, or name another output.") from error
            cls._claim(folder, key)
            yield cls(folder, final)

    @staticmethod
    def _claim(folder: Path, key: Mapping[str, Any]) -> None:
        path = folder / NAME
        if not path.exists():
            write_json(path, key)
            return
        begun = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(key))
        differs = [name for name in sorted({*begun, *now}) if begun.get(name) != now.get(name)]
        if differs:
            changes = "; ".join(f"{name} was {begun.get(name)!r} and is {now.get(name)!r}" for name in differs)
            raise FamilyError(
                f"The unfinished run in {folder} was made of something else: {changes}.",
                remedy="Say --restart to throw it away, or name another output.",
            )

    def finish(self) -> None:
        """The folder takes its final name; what had this name before is gone."""
        for name in (NAME, ".lock"):
            remove(self.folder / name)
        try:
            replace(self.folder, self.final)
        except OSError as error:
            raise output_error(error, self.final) from error
