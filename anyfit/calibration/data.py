"""Segments of text for the three purposes that must never share any: calibration, search and report."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anyfit.calibration.text import Line, Passage, documents, find
from anyfit.core.errors import DataError
from anyfit.interface import PADDING, present
from anyfit.zoo import DATA
from anyfit.zoo.corpus import modules

PURPOSES = ("calibration", "search", "report")
_SHARES = (0.70, 0.15, 0.15)
_MANY_DOCUMENTS = 20
"""From here on each document serves one purpose; with fewer, each is cut in three."""
_BYTES_PER_TOKEN = 16
"""More than any text takes: segments are drawn this far apart, so that each is full."""
_LIKELY_BYTES_PER_TOKEN = 6
"""Read at first; the rest only where that didn't fill the segment."""


@dataclass(frozen=True)
class Pending:
    """Tokens of a known `shape` that are made when they are first asked for."""

    shape: tuple[int, int]
    make: Callable[[], Tensor]


class Segments:
    """Tokens by purpose, each (segments, length) int64, or pictures, (segments, channels, height, width) float32. `description` says what
    they were, `notes` what to know."""

    def __init__(
        self,
        calibration: Tensor | Pending,
        search: Tensor | Pending,
        report: Tensor | Pending,
        description: str,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._given = dict(zip(PURPOSES, (calibration, search, report), strict=True))
        self.description, self.notes = description, notes

    @cached_property
    def calibration(self) -> Tensor:
        return self._made("calibration")

    @cached_property
    def search(self) -> Tensor:
        return self._made("search")

    @cached_property
    def report(self) -> Tensor:
        return self._made("report")

    @property
    def digest(self) -> str:
        """Hash of the tokens themselves."""
        content = hashlib.sha256()
        for tokens in (self.calibration, self.search, self.report):
            numbers = tokens.numpy().astype("<f4" if tokens.is_floating_point() else "<i8")
            content.update(f"{tuple(tokens.shape)}".encode() + numbers.tobytes())
        return content.hexdigest()

    def num_segments(self, purpose: str) -> int:
        """How many there are, without making any."""
        return self._given[purpose].shape[0]

    @property
    def num_pending(self) -> int:
        """Tokens that are still to be made."""
        pending = (given for purpose, given in self._given.items() if isinstance(given, Pending) and purpose not in self.__dict__)
        return sum(math.prod(given.shape) for given in pending)

    def _made(self, purpose: str) -> Tensor:
        given = self._given[purpose]
        return given.make() if isinstance(given, Pending) else given


def load(
    data: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    num_calibration: int,
    num_search: int,
    num_report: int,
    seed: int = 0,
    texts: bool = False,
) -> Segments:
    """Segments of `length` tokens, without overlap, drawn by `seed`. `texts`: for an encoder, which reads whole texts: where they are
    short, each segment is one, with padding up to the longest.

    `data` are UTF-8 text files, JSONL with a `text` or the `messages` of a chat, parquet or arrow files with such
    columns, folders of all these or saved by the `datasets` library, names of the Hugging Face hub as
    `hf:NAME[:CONFIG][@SPLIT]`, in any mix; or "stdlib", the Python standard library, also as the only one of a list
    where no file is called so. Users' text is divided 70/15/15 by size; the standard library by module. Where there
    is too little text, there are fewer segments, and a note. Only as much is tokenised as is needed.
    Raises `DataError` for text that can't be read or doesn't make one segment for each purpose.
    """
    wanted = dict(zip(PURPOSES, (num_calibration, num_search, num_report), strict=True))
    most = max(wanted[purpose] / share for purpose, share in zip(PURPOSES, _SHARES, strict=True))
    parts, description, notes = _parts(data, tokenizer, enough=_enough(length, most), seed=seed)
    reader = _Reader(tokenizer, length, texts=texts)
    drawn = {purpose: reader.draw(parts[purpose], wanted[purpose], seed) for purpose in PURPOSES}
    longest = max((int(present(tokens).sum(1).max()) for tokens in drawn.values() if len(tokens)), default=length)
    drawn = {purpose: tokens[:, :longest] for purpose, tokens in drawn.items()}
    if not all(len(tokens) for tokens in drawn.values()):
        raise _too_short(description, reader, parts)
    for purpose, tokens in drawn.items():
        if len(tokens) < wanted[purpose]:
            notes.append(f"the text has {len(tokens)} segments of {length} tokens for {purpose}, not {wanted[purpose]}")
    return Segments(**drawn, description=description, notes=tuple(notes))


def held_out(
    data: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    num_segments: int,
    seed: int = 0,
    texts: bool = False,
) -> tuple[Tensor, str]:
    """Segments for measuring only, (segments, length) int64, from all of the text; of "stdlib", the report's part.

    Returns them with a description. Raises `DataError` as `load` does.
    """
    if is_named(data, DATA):
        passages, description = [Passage.of(text) for text in modules("report")], _stdlib()
    else:
        passages, description, _ = _documents(data, tokenizer, enough=_enough(length, num_segments), seed=seed)
    reader = _Reader(tokenizer, length, texts=texts)
    tokens = reader.draw(passages, num_segments, seed)
    if not len(tokens):
        raise DataError(
            f"{description} has {reader.count(passages)} tokens, fewer than one segment of {length}.",
            remedy="Take shorter segments (--length) or more text.",
        )
    return tokens, description


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its beginning-of-sequence token before any text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after any text by itself."""
    plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at], whole[at + len(plain) :]


class _Reader:
    """Draws segments from passages. A segment starts with BOS where the tokenizer adds it by itself.

    `texts`: for an encoder. A segment is a text with all that the tokenizer puts around it, and where most passages are as short as that,
    one of them: its beginning, and padding after its end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, *, texts: bool = False) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._prefix, self._suffix = around(tokenizer) if texts else ([tokenizer.bos_token_id] if adds_bos(tokenizer) else [], [])
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None and not texts else []
        self.length = length
        self.payload = length - len(self._prefix) - len(self._suffix)
        if self.payload < 1 or length < 2:
            raise DataError(f"Segments of {length} tokens predict nothing.", remedy="Take at least a few hundred tokens.")

    def draw(self, passages: Sequence[Passage], wanted: int, seed: int) -> Tensor:
        """At most `wanted` segments, (segments, length) int64: all that fit where the text is scarce."""
        if self.whole(passages):
            return self._whole(passages, wanted, seed)
        line, rng = Line(passages), np.random.default_rng(seed)
        block = self.payload * _BYTES_PER_TOKEN
        num_blocks = line.size // block
        if num_blocks <= wanted:
            ids = self._tokens(line, 0, line.size)
            starts = rng.permutation(len(ids) // self.payload)[:wanted] * self.payload
            payloads = [ids[at : at + self.payload] for at in sorted(starts.tolist())]
        else:
            payloads = []
            for index in rng.permutation(num_blocks).tolist():
                if len(payloads) == wanted:
                    break
                ids = self._tokens(line, index * block, index * block + self.payload * _LIKELY_BYTES_PER_TOKEN)
                if len(ids) < self.payload:
                    ids = self._tokens(line, index * block, (index + 1) * block)
                if len(ids) >= self.payload:
                    payloads.append(ids[: self.payload])
        rows = [self._prefix + payload + self._suffix for payload in payloads]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.length)

    def whole(self, passages: Sequence[Passage]) -> bool:
        """Whether each segment is a text."""
        return self._texts and bool(np.median([passage.size for passage in passages] or [0]) <= self.payload * _BYTES_PER_TOKEN)

    def _whole(self, passages: Sequence[Passage], wanted: int, seed: int) -> Tensor:
        """One segment a passage."""
        rows: list[list[int]] = []
        for index in np.random.default_rng(seed).permutation(len(passages)).tolist():
            if len(rows) == wanted:
                break
            text = passages[index].read(0, self.payload * _BYTES_PER_TOKEN)
            if ids := list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[: self.payload]:
                row = self._prefix + ids + self._suffix
                rows.append(row + [PADDING] * (self.length - len(row)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.length)

    def count(self, passages: Sequence[Passage]) -> int:
        """How many tokens the passages have. Only for text known to be short."""
        line = Line(passages)
        return len(self._tokens(line, 0, line.size))

    def _tokens(self, line: Line, start: int, stop: int) -> list[int]:
        """Of all the text between two bytes; the tokenizer's end token, where it has one, between passages."""
        ids: list[int] = []
        for pieces in line.read(start, stop):
            ids += self._end if ids else []
            for encoded in self._tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]:
                ids += encoded
        return ids


def _enough(length: int, num_segments: float) -> int:
    """Bytes of text that surely hold so many segments."""
    return math.ceil(num_segments * length * _BYTES_PER_TOKEN)


def _parts(
    data: str | Path | Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, *, enough: int, seed: int
) -> tuple[dict[str, list[Passage]], str, list[str]]:
    if is_named(data, DATA):
        splits = dict(zip(PURPOSES, ("train", "search", "report"), strict=True))
        return {purpose: [Passage.of(text) for text in modules(split)] for purpose, split in splits.items()}, _stdlib(), []
    passages, description, notes = _documents(data, tokenizer, enough=enough, seed=seed)
    return _divide(passages, seed), description, notes


def _documents(
    data: str | Path | Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, *, enough: int, seed: int
) -> tuple[list[Passage], str, list[str]]:
    sources, notes = find(data)
    passages, more = documents(sources, tokenizer, enough=enough, seed=seed)
    named = ", ".join(source.name for source in sources[:3]) + (f" and {len(sources) - 3} more files" if len(sources) > 3 else "")
    return passages, named, notes + more


def _divide(passages: list[Passage], seed: int) -> dict[str, list[Passage]]:
    """Few documents: each is cut in three. Many: each goes whole to the purpose that lacks most."""
    parts: dict[str, list[Passage]] = {purpose: [] for purpose in PURPOSES}
    if len(passages) < _MANY_DOCUMENTS:
        for passage in passages:
            for purpose, piece in zip(PURPOSES, passage.cut(_SHARES), strict=True):
                parts[purpose].append(piece)
        return parts
    total = sum(passage.size for passage in passages)
    lacking = {purpose: share * total for purpose, share in zip(PURPOSES, _SHARES, strict=True)}
    for index in np.random.default_rng(seed).permutation(len(passages)).tolist():
        purpose = max(lacking, key=lambda name: lacking[name])
        parts[purpose].append(passages[index])
        lacking[purpose] -= passages[index].size
    return parts


def is_named(data: str | Path | Sequence[str | Path] | None, name: str) -> bool:
    """Whether a text that goes by a name of its own is asked for, in a list only where no file is called so."""
    return data == name or (isinstance(data, Sequence) and not isinstance(data, str) and list(data) == [name] and not Path(name).exists())


def _stdlib() -> str:
    return f"the standard library of Python {platform.python_version()}"


def _too_short(description: str, reader: _Reader, parts: dict[str, list[Passage]]) -> DataError:
    counts = {purpose: reader.count(passages) for purpose, passages in parts.items()}
    listed = ", ".join(f"{count} for {purpose}" for purpose, count in counts.items())
    if reader.whole(next(iter(parts.values()))):
        return DataError(
            f"{description} has {sum(counts.values())} tokens ({listed}); each of the three needs a text.", remedy="Add more texts."
        )
    return DataError(
        f"{description} has {sum(counts.values())} tokens ({listed}); each of the three needs a segment of {reader.length}, "
        f"in all about {round(reader.payload / min(_SHARES))}.",
        remedy="Take shorter segments (--length) or more text.",
    )
