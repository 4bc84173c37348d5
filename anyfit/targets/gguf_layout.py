"""Where everything of a network goes in a GGUF file: names, order of rows, the tensors that nobody decides about."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor
from transformers import PretrainedConfig

from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.formats import formats
from anyfit.targets import gguf_metadata, gguf_tokenizer
from anyfit.targets.gguf_kinds import Kind, kind_of

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_SMALL = ("Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0")
_SUBSTITUTES = {"Q6_K": "Q8_0", "Q5_K": "Q5_0", **dict.fromkeys(_SMALL, "IQ4_NL")}
"""What stands in for a type of 256 columns where rows are no multiple of that: the nearest in size of 32 columns."""
ANY_ROW = "F16"
_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "MXFP4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
    **{name: gguf.LlamaFileType[f"MOSTLY_{name}_S"] for name in ("Q3_K", "Q4_K", "Q5_K")},
}


@dataclass(frozen=True)
class Matrix:
    """One decided matrix of the file. `name` is its name there, `source` its parameter's in the checkpoint."""

    name: str
    source: str
    shape: tuple[int, int]
    format: str

    @property
    def bytes_(self) -> int:
        """Without padding."""
        return formats.get(self.format).bytes_(self.shape)


def kind(source: Source) -> Kind:
    """The facts of this network's kind, which must be a known one."""
    return kind_of(source.config)


def file_name(config: PretrainedConfig, name: str) -> str | None:
    """llama.cpp's name for a parameter of the checkpoint; None where it has no place for it."""
    return _names(kind_of(config).arch, config.num_hidden_layers).get_name(name, try_suffixes=(".weight", ".bias"))


@lru_cache(maxsize=8)
def _names(arch: gguf.MODEL_ARCH, num_blocks: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(arch, num_blocks)


def places(source: Source, name: str) -> Iterator[str]:
    """The file's tensors that hold this matrix: one, or two where llama.cpp can't share embedding and output."""
    own = file_name(source.config, name)
    assert own, name
    yield own
    if kind(source).head == "own":
        for other, stored in source.tied.items():
            if stored == name and (copy := file_name(source.config, other)):
                yield copy


def matrices(source: Source, shapes: Mapping[str, tuple[int, int]], config: Config) -> list[Matrix]:
    """All decided matrices in the order of the file. `shapes`: (outputs, inputs) by the checkpoint's names."""
    found = [Matrix(place, name, shape, config.format(name)) for name, shape in shapes.items() for place in places(source, name)]
    return sorted(found, key=lambda matrix: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", matrix.name)])


def row_order(source: Source, name: str, num_rows: int) -> Tensor | None:
    """Rows of the file's tensor as indices into the checkpoint's, which has so many; None where the order is the same."""
    tensor = file_name(source.config, name)
    assert tensor, name
    rows = kind(source).rows.get(_stem(tensor))
    return rows(source.config, num_rows) if rows else None


def _stem(tensor: str) -> str:
    """`blk.3.attn_q.bias` to `attn_q`."""
    return tensor.split(".")[-2]


def stored_value(source: Source, name: str, value: Tensor) -> Tensor:
    """What the file holds for a parameter that nobody decides about: float32, in the file's order."""
    value = value.detach().float()
    if name.endswith("norm.weight"):
        value = value + kind(source).norm_offset
    return in_order(source, name, value)


def in_order(source: Source, name: str, value: Tensor) -> Tensor:
    """A parameter with its rows in the file's order."""
    order = row_order(source, name, len(value))
    return value if order is None else value[order]


def fixed_tensors(source: Source) -> dict[str, Tensor]:
    """Norms, biases, positions and rotary tables by their name in the file, float32."""
    tensors: dict[str, Tensor] = {}
    for name, value in source.passthrough.items():
        tensor = file_name(source.config, name)
        assert tensor, name
        tensors[tensor] = stored_value(source, name, value)
    return tensors | gguf_metadata.rotary_tensors(source.config, kind(source))


def misplaced(source: Source) -> str | None:
    """A parameter that llama.cpp doesn't read for this kind of network; None where all have a place."""
    for name in source.passthrough:
        tensor = file_name(source.config, name)
        if tensor is None or (tensor.endswith(".bias") and _stem(tensor) not in kind(source).biases):
            return name
    return None


def write_header(
    path: Path, source: Source, decided: Sequence[Matrix], fixed: Mapping[str, Tensor], *, tokenizer: bool = True
) -> gguf.GGUFWriter:
    """Write all that comes before the tensors' numbers; those follow by `write_tensor_data`, in the same order.

    A file without a `tokenizer` runs on numbers of tokens only.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind(source).arch])
    vocabulary = gguf_tokenizer.read(source.tokenizer(), source.config) if tokenizer else None
    if vocabulary is not None:
        writer.add_name(_title(source.config, vocabulary))
    writer.add_file_type(_file_type(decided))
    gguf_metadata.add_network(writer, source.config, kind(source))
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        gguf_tokenizer.write(writer, vocabulary)
    for matrix in decided:
        rows, row_bytes = matrix.shape[0], formats.get(matrix.format).row_bytes(matrix.shape[1])
        type_ = gguf.GGMLQuantizationType[matrix.format]
        writer.add_tensor_info(matrix.name, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, type_)
    for name, value in fixed.items():
        writer.add_tensor_info(name, value.shape, np.dtype(np.float32), 4 * value.numel())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    except BaseException:
        writer.close()
        raise
    return writer


def legal(name: str, shape: tuple[int, int]) -> str:
    """The format, or the nearest that a matrix of this shape can have."""
    tried = (name, _SUBSTITUTES.get(name, ANY_ROW))
    return next((other for other in tried if formats.get(other).refuses(shape) is None), ANY_ROW)


def padded(num_bytes: int) -> int:
    """What a tensor of this size takes in the file."""
    return gguf.GGUFWriter.ggml_pad(num_bytes, ALIGNMENT)


def _title(config: PretrainedConfig, vocabulary: gguf_tokenizer.Vocabulary) -> str:
    """A name that no reader takes for more than that.

    transformers reads a file that is named exactly `mistral` as a class that it then has no tensor names for.
    llama.cpp strips spaces after special tokens, and looks for some by their text, where a name has `phi3` in it.
    """
    kind_of_network = "phi" if config.model_type == "phi3" and not vocabulary.strips else config.model_type
    return f"{kind_of_network} network"


def _file_type(decided: Sequence[Matrix]) -> gguf.LlamaFileType:
    """The one word that llama.cpp shows for a file: the format that most weights are in."""
    weights: Counter[str] = Counter()
    for matrix in decided:
        weights[matrix.format] += matrix.shape[0] * matrix.shape[1]
    most = min(weights, key=lambda name: (-weights[name], name))
    return _FILE_TYPES[most] if most in _FILE_TYPES else gguf.LlamaFileType[f"MOSTLY_{most}"]
