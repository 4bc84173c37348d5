"""Text from files: found, checked, and read in parts, so that no size of input needs more memory than a part."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from anyfit.calibration import tables
from anyfit.calibration.rows import text_of
from anyfit.calibration.tables import Hub
from anyfit.core.errors import DataError

SUFFIXES = (".txt", ".md", ".rst", ".jsonl", *tables.SUFFIXES)
"""What is taken from a folder. A file that is named by itself may be called anything."""
_PIECE = 1 << 16
_MOST_CONTINUATION = 3
"""Bytes of a UTF-8 character after its first."""
_LARGEST_JSONL = 64_000_000
"""Bytes of rows that are read from one file; of a longer one, evenly spaced blocks."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Passage:
    """Consecutive text: bytes `start` to `stop` of a file, or of `content` where it is in memory."""

    path: Path | None
    start: int
    stop: int
    content: bytes = b""

    @classmethod
    def of(cls, text: str) -> Passage:
        content = text.encode()
        return cls(None, 0, len(content), content)

    @property
    def size(self) -> int:
        return self.stop - self.start

    def cut(self, shares: Sequence[float]) -> list[Passage]:
        """One after the other, each with its share of the bytes."""
        ends = [self.start + round(self.size * share) for share in accumulate(shares)]
        return [Passage(self.path, a, b, self.content) for a, b in zip([self.start, *ends], ends, strict=False)]

    def read(self, start: int, stop: int) -> str:
        """The characters that start within these bytes, counted from the passage's own start.

        So parts that follow one another lose no character, and share none. Raises `DataError` for bytes that
        are not UTF-8 text.
        """
        start, stop = self.start + start, min(self.start + stop, self.stop)
        if self.path is None:
            return _decode(self.content[start : stop + _MOST_CONTINUATION], start, stop, Path("text"))
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(stop - start + _MOST_CONTINUATION)
        text = _decode(content, start, stop, self.path)
        if "\0" in text:
            raise DataError(f"{self.path} is binary, not text: byte {start + content.index(0)} is zero.", remedy="Name text in UTF-8.")
        return text


class Line:
    """Passages end to end, addressed by byte."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._passages = [passage for passage in passages if passage.size]
        self._starts = [0, *accumulate(passage.size for passage in self._passages)]

    @property
    def size(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Iterator[list[str]]:
        """The text of each passage that these bytes touch, in pieces short enough for any tokenizer."""
        for index in range(bisect_right(self._starts, start) - 1, len(self._passages)):
            passage, offset = self._passages[index], self._starts[index]
            if offset >= stop:
                return
            first, last = max(start - offset, 0), min(stop - offset, passage.size)
            yield [passage.read(at, min(at + _PIECE, last)) for at in range(first, last, _PIECE)]


def find(data: str | Path | Sequence[str | Path]) -> tuple[list[Path | Hub], list[str]]:
    """What the user named, folders looked through, with notes of what was left out. Raises `DataError`.

    A folder that the `datasets` library saved is one thing, like a file.
    """
    named = [data] if isinstance(data, str | Path) else list(data)
    if not named:
        raise DataError("No text was named.", remedy="Name text files, a folder of them, or JSONL.")
    found: list[Path | Hub] = []
    notes: list[str] = []
    for item in named:
        if isinstance(item, str) and item.startswith(tables.PREFIX):
            found.append(Hub.parse(item))
            continue
        path = Path(item).expanduser()
        if not path.exists():
            raise DataError(
                f"There is no file or folder {path}.",
                remedy=f"Check the path that was given as data; a data set of the Hugging Face hub is named as {tables.PREFIX}{item}.",
            )
        if not os.access(path, os.R_OK):
            raise DataError(f"{path} can't be read.", remedy="Allow reading it.")
        if path.is_file() and not path.stat().st_size:
            raise DataError(f"{path} is empty.", remedy="Name a file with text in it.")
        found += _in_folder(path, notes) if path.is_dir() and not tables.is_saved(path) else [path]
    return list(dict.fromkeys(found)), notes


def documents(
    sources: Sequence[Path | Hub], tokenizer: PreTrainedTokenizerBase, *, enough: int, seed: int
) -> tuple[list[Passage], list[str]]:
    """One passage for each text file and for each row of JSONL and of data sets, with notes. Raises `DataError`.

    Data sets are read until they have `enough` bytes, at places that are drawn by `seed`.
    """
    passages: list[Passage] = []
    notes: list[str] = []
    for source in sources:
        if isinstance(source, Hub) or source.is_dir() or source.suffix in tables.SUFFIXES:
            passages += [Passage.of(text) for text in tables.texts(source, tokenizer, enough=enough, seed=seed)]
        elif source.suffix == ".jsonl":
            passages += [Passage.of(text) for text in _rows(source, tokenizer, notes)]
        else:
            passages.append(Passage(source, 0, source.stat().st_size))
    return passages, notes


def _in_folder(folder: Path, notes: list[str]) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file() and not tables.is_cache(path))
    files = [path for path in found if path.stat().st_size]
    if not files:
        raise DataError(
            f"{folder} has no text files ({', '.join(SUFFIXES)}).", remedy="Name the files themselves if they are called otherwise."
        )
    if len(files) < len(found):
        notes.append(f"{len(found) - len(files)} empty files in {folder} were left out")
    return files


def _decode(content: bytes, offset: int, stop: int, path: Path) -> str:
    """The characters that start before byte `stop`; `content` begins at byte `offset`, and a character begun before isn't read."""
    first = _next_character(content, 0) if offset else 0
    content = content[: _next_character(content, stop - offset)]
    try:
        text = content[first:].decode()
        return text if offset else text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        at = first + error.start
        if error.reason == "unexpected end of data" and at >= len(content) - _MOST_CONTINUATION:
            return content[first:at].decode()
        raise DataError(
            f"{path} is not UTF-8: byte {offset + at} is 0x{content[at]:02x}.",
            remedy="Save it as UTF-8, for example: iconv -f LATIN1 -t UTF-8 OLD > NEW.",
        ) from error


def _next_character(content: bytes, at: int) -> int:
    """Where the next character starts, from byte `at` on."""
    following = content[at : at + _MOST_CONTINUATION]
    return at + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _rows(path: Path, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> Iterator[str]:
    size = path.stat().st_size
    if size <= _LARGEST_JSONL:
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(line, f"{path}, line {number}", path, offset, tokenizer)
                offset += len(line)
        return
    num_blocks = _LARGEST_JSONL // _BLOCK
    notes.append(f"{path.name}: {num_blocks} evenly spaced blocks of {_BLOCK >> 20} MiB were read, not all of it")
    with path.open("rb") as file:
        for block in range(num_blocks):
            file.seek(block * (size - _BLOCK) // (num_blocks - 1))
            if block:
                file.readline()
            end = file.tell() + _BLOCK
            while (offset := file.tell()) < end and (line := file.readline()):
                if line.strip():
                    yield _row(line, f"{path}, at byte {offset}", path, offset, tokenizer)


def _row(line: bytes, where: str, path: Path, offset: int, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        row = json.loads(_decode(line, 0, len(line), path)) if not offset else json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {offset + error.start}.", remedy="Save it as UTF-8.") from error
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}).", remedy="Write one JSON object a line.") from error
    return text_of(row if isinstance(row, dict) else {}, where, tokenizer)
