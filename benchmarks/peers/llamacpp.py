"""llama.cpp's quantiser, called in its C library: what its tool llama-quantize does with an importance matrix.

    python -m peers.llamacpp IN.gguf OUT.gguf --preset Q4_K_M --importance FILE.npz

The importance matrix is a vector for each tensor of the file, the mean squares of its inputs, which is what the tool
llama-imatrix collects.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def importance_data(vectors: dict[str, np.ndarray]) -> ctypes.Array[llama_cpp.llama_model_imatrix_data]:
    """The array that llama.cpp reads, ended by an entry without a name. It points into `vectors`, float32."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(vectors) + 1))()
    for entry, (name, values) in zip(entries, vectors.items(), strict=False):
        assert values.dtype == np.float32 and values.flags.c_contiguous, name
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def quantise(source: Path, output: Path, preset: str, vectors: dict[str, np.ndarray], num_threads: int) -> int:
    """Write `source` to `output` as `preset`; llama.cpp's status, zero for success."""
    params = llama_cpp.llama_model_quantize_default_params()
    entries = importance_data(vectors)
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{preset}"), num_threads
    params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    return llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--importance", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with np.load(args.importance) as archive:
        vectors = {name: np.ascontiguousarray(archive[name], dtype=np.float32) for name in archive.files}
    llama_cpp.llama_backend_init()
    return quantise(args.source, args.output, args.preset, vectors, args.threads)


if __name__ == "__main__":
    sys.exit(main())
