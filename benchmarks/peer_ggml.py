"""llama.cpp's own quantiser, called in its C library: the peer of `formats.py`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor


@cache
def _library() -> ctypes.CDLL:
    """libggml as llama-cpp-python brings it."""
    import llama_cpp

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def quantise(weight: Tensor, type_: str, importance: Tensor) -> Tensor:
    """`weight` (rows, columns) as llama.cpp would store and read it, given the mean squares of the inputs."""
    kind = gguf.GGMLQuantizationType[type_]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    values = np.ascontiguousarray(weight.numpy(), dtype=np.float32)
    matrix = np.ascontiguousarray(importance.numpy(), dtype=np.float32)
    packed = np.zeros((rows, columns // block * size), np.uint8)
    written = _library().ggml_quantize_chunk(int(kind), values.ctypes.data, packed.ctypes.data, 0, rows, columns, matrix.ctypes.data)
    assert written == packed.nbytes, (type_, written, packed.nbytes)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind).copy())
