"""Data sets in columns, read by the `datasets` library: parquet and arrow files, saved data sets, names of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from anyfit.calibration.rows import MESSAGES, TEXT, text_of
from anyfit.core.errors import DataError, RuntimeMissingError, UserError

PREFIX = "hf:"
"""What a name of the hub starts with; everything else is a path. A file that is called so is named as `./hf:...`."""
SUFFIXES = (".parquet", ".arrow")
_SAVED = ("state.json", "dataset_dict.json")
_NAME = re.compile(r"(?P<path>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^:@]+))?(?:@(?P<split>[\w.-]+))?")
_NUM_RUNS = 8
"""Places of a data set that rows are read at, if it is larger than what is needed."""
_MANY_BLANK = 0.1
"""From this share of empty rows on, a row is a line of a longer text."""


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub, as `datasets.load_dataset` takes it; None lets the library choose."""

    path: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, given: str) -> Hub:
        """From `hf:NAME[:CONFIG][@SPLIT]`. Raises `DataError`."""
        found = _NAME.fullmatch(given.removeprefix(PREFIX))
        if not found:
            raise DataError(f"{given} is no name of a data set.", remedy="Write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG@SPLIT.")
        if Path(found["path"]).exists():
            raise DataError(
                f"{given} names a data set of the hub, but there is a file or folder {found['path']} here.",
                remedy="Name local data by its path, without hf:; or run this from another folder.",
            )
        return cls(found["path"], found["config"], found["split"])

    @property
    def name(self) -> str:
        return self.path + (f":{self.config}" if self.config else "") + (f"@{self.split}" if self.split else "")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote this folder."""
    return any((folder / name).is_file() for name in _SAVED)


def is_cache(path: Path) -> bool:
    """Whether the `datasets` library left this file beside a data set, for rows that it has computed."""
    return path.suffix == ".arrow" and path.name.startswith("cache-")


def texts(source: Path | Hub, tokenizer: PreTrainedTokenizerBase, *, enough: int, seed: int) -> list[str]:
    """The documents of a data set with a column `text` or `messages`, until they have `enough` bytes.

    Of a larger one, runs of neighbouring rows from places that are drawn by `seed`. Where many rows are empty,
    rows are lines, and a run of them is one document. The hub is only asked for a `Hub`. Raises `DataError`, and
    `RuntimeMissingError` without the library.
    """
    name = source.name if isinstance(source, Hub) else str(source)
    library = _library(name)
    found: list[str] = []
    with _reasons(source, name):
        stream = _open(library, source)
        stream = stream.select_columns(_column(stream, name))
        stream = stream.reshard() if stream.num_shards < _NUM_RUNS else stream
        missing, share = enough, enough // min(_NUM_RUNS, stream.num_shards)
        for index in np.random.default_rng(seed).permutation(stream.num_shards).tolist():
            if missing <= 0:
                break
            run, size = [], 0
            for row in stream.shard(stream.num_shards, index):
                run.append(_text(row, f"a row of {name}", tokenizer))
                size += len(run[-1].encode())
                if size >= share:
                    break
            found += _documents(run)
            missing -= size
    return found


def _library(name: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise RuntimeMissingError("datasets", "datasets", f"Reading {name}") from error
    module: ModuleType = datasets
    return module


@contextmanager
def _reasons(source: Path | Hub, name: str) -> Iterator[None]:
    """What the library refuses, in its own words. It raises whatever the layers below it do: any of it is a `DataError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = (
            "Check the name, its config (hf:NAME:CONFIG) and the connection, or name local files."
            if isinstance(source, Hub)
            else "Write it again with the datasets library: to_parquet or save_to_disk."
        )
        raise DataError(f"{name} can't be read as a data set: {reason}", remedy=remedy) from error


def _open(library: ModuleType, source: Path | Hub) -> Any:
    """An iterable data set, of which nothing has been read."""
    if isinstance(source, Hub):
        return _split(library.load_dataset(source.path, source.config, streaming=True), source)
    if source.suffix == ".parquet":
        return library.load_dataset("parquet", data_files=[str(source)], split="train", streaming=True)
    found = library.load_from_disk(str(source)) if source.is_dir() else library.Dataset.from_file(str(source))
    joined = library.concatenate_datasets(list(found.values())) if isinstance(found, library.DatasetDict) else found
    return joined.to_iterable_dataset(num_shards=max(1, min(_NUM_RUNS * _NUM_RUNS, len(joined))))


def _split(splits: Mapping[str, Any], source: Hub) -> Any:
    name = source.split or ("train" if "train" in splits else next(iter(splits)))
    if name not in splits:
        raise DataError(f"{source.path} has no split {name!r}.", remedy=f"It has: {', '.join(splits)}.")
    return splits[name]


def _column(stream: Any, name: str) -> str:
    columns = list(stream.column_names or next(iter(stream), {}))
    for column in (TEXT, MESSAGES):
        if column in columns:
            return column
    raise DataError(
        f'{name} has neither a column "text" nor "messages"; it has: {", ".join(columns)}.',
        remedy=f'Rename the one to use: rename_column("{columns[0] if columns else "body"}", "text").to_parquet("mine.parquet").',
    )


def _text(row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Arrow fills up what a row or a message lacks with None: it is taken out again, for templates ask whether it is there."""
    if TEXT in row and row[TEXT] is None:
        return ""
    if isinstance(row.get(MESSAGES), list):
        row = {MESSAGES: [{key: value for key, value in message.items() if value is not None} for message in row[MESSAGES]]}
    return text_of(row, where, tokenizer)


def _documents(run: list[str]) -> list[str]:
    filled = [text for text in run if text.strip()]
    if len(run) - len(filled) < _MANY_BLANK * len(run):
        return filled
    return ["".join(text if text.endswith("\n") else text + "\n" for text in run)] if filled else []
