"""Safetensors files whose size is a plain sum: a tensor adds the same bytes whatever else the file holds.

The header of such a file is JSON, and JSON allows spaces. Here offsets have one width and each entry is filled up
to whole words of 8 bytes, so an entry's length follows from the tensor's name, type and shape alone. The files
are ordinary safetensors otherwise: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""A folder is split into files of at most this size, unless a single tensor is larger."""
_OFFSET_WIDTH = 13
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_OPENING, _CLOSING = '{"__metadata__":{"format":"pt"}', "}"
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Slot:
    """A tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Slot:
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def data_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_(self) -> int:
        """What it adds to the file: data and header entry."""
        return self.data_bytes + len(self.entry(0))

    def entry(self, offset: int) -> bytes:
        """Its part of the header, with the comma that parts it from what stands before."""
        place = ",".join(f"{number:>{_OFFSET_WIDTH}}" for number in (offset, offset + self.data_bytes))
        assert len(place) == 2 * _OFFSET_WIDTH + 1, (self.name, offset)
        shape = ",".join(map(str, self.shape))
        text = f',{json.dumps(self.name)}:{{"dtype":"{_CODES[self.dtype]}","shape":[{shape}],"data_offsets":[{place}]}}'
        return _whole_words(text)


def _whole_words(text: str) -> bytes:
    return text.encode() + b" " * (-len(text.encode()) % 8)


EMPTY_BYTES = _LENGTH_BYTES + len(_whole_words(_OPENING)) + len(_whole_words(_CLOSING))
"""Size of a file that holds no tensor."""


def write_file(path: Path, slots: Iterable[Slot], tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Write one file and return its size. Each slot's tensor comes once, in any order; none is kept.

    The bytes depend on the slots and the values, not on the order of either.
    """
    header, places = _layout(slots)
    size = len(header) + sum(slot.data_bytes for _, slot in places.values())
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            offset, slot = places.pop(name)
            assert Slot.of(name, tensor) == slot, (Slot.of(name, tensor), slot)
            file.seek(len(header) + offset)
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    assert not places, sorted(places)
    return size


def offsets(slots: Iterable[Slot]) -> dict[str, int]:
    """Where in the file each tensor's data begin, in bytes from the file's start: for whoever points into it."""
    header, places = _layout(slots)
    return {name: len(header) + offset for name, (offset, _) in places.items()}


def _layout(slots: Iterable[Slot]) -> tuple[bytes, dict[str, tuple[int, Slot]]]:
    """The header, and each tensor's offset behind it. Wide types come first, which aligns every tensor."""
    entries, places, offset = [_whole_words(_OPENING)], {}, 0
    for slot in sorted(slots, key=lambda s: (-s.dtype.itemsize, s.name)):
        entries.append(slot.entry(offset))
        places[slot.name] = (offset, slot)
        offset += slot.data_bytes
    header = b"".join([*entries, _whole_words(_CLOSING)])
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header, places


def shards(sizes: Sequence[int]) -> list[range]:
    """Which of consecutive parts go into one file together, when part i takes at most `sizes[i]` bytes."""
    starts, filled = [0], 0
    for index, size in enumerate(sizes):
        if filled and filled + size > MAX_SHARD_BYTES:
            starts.append(index)
            filled = 0
        filled += size
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def shard_names(num_shards: int) -> list[str]:
    """File names, as the loaders of the Hugging Face hub expect them."""
    if num_shards == 1:
        return [SINGLE]
    return [f"model-{index:05}-of-{num_shards:05}.safetensors" for index in range(1, num_shards + 1)]


def write_index(folder: Path, files: Mapping[str, Iterable[Slot]]) -> None:
    """Say which file holds which tensor."""
    slots = {slot.name: (file, slot.data_bytes) for file, held in files.items() for slot in held}
    index = {
        "metadata": {"total_size": sum(size for _, size in slots.values())},
        "weight_map": {name: file for name, (file, _) in sorted(slots.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
