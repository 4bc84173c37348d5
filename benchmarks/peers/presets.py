"""llama.cpp's presets, quantised by llama.cpp with an importance matrix and measured here."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from anyfit.architectures import architecture_of
from anyfit.calibration.collect import collect
from anyfit.core.files import written_aside
from anyfit.formats import formats
from anyfit.progress import Silent
from anyfit.targets import targets
from anyfit.targets.gguf_layout import file_name
from anyfit.targets.llamacpp import read_model
from peers.results import NOT_RUN, Keep, Outcome, Refused, Result, evaluate, kept
from peers.subjects import Subject

PEER = "llama.cpp"
PRESETS = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
    *("Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
)
BENCHMARKS = Path(__file__).parent.parent
_FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def outcomes(subject: Subject, *, keep: Keep) -> Iterator[Outcome]:
    """Every preset; two that come to the same tensors are both listed."""
    source, importance = subject.work / "original.gguf", subject.work / "importance.npz"
    key: dict[str, Any] = {
        "model": subject.checkpoint.digest,
        "text": subject.segments.digest,
        "version": version("llama-cpp-python"),
    }

    def make(preset: str) -> Outcome:
        if not source.exists() or not importance.exists():
            write_original(subject, source)
            np.savez(importance, **importance_vectors(subject))
        return quantised(subject, source, importance, preset)

    if keep is Keep.FRESH:
        source.unlink(missing_ok=True)
    for preset in PRESETS:
        path = subject.work / PEER / f"{preset}.json"
        found = kept(path, {**key, "preset": preset}, lambda name=preset: make(name), keep=keep)
        yield found or Refused(PEER, preset, NOT_RUN)


def write_original(subject: Subject, path: Path) -> None:
    """The network as GGUF with every matrix in the checkpoint's own type, which loses nothing."""
    target, source = targets.get(PEER), subject.checkpoint.source(subject.weights)
    own = _FLOATS[subject.checkpoint.dtype]
    space = target.space(source, subject.weights, [own])

    def variant(name: str, format_: str) -> torch.Tensor:
        weight = next(weight for weight in subject.weights if weight.name == name)
        matrix = subject.checkpoint.read(name).float()
        matrix = matrix.T if weight.transposed else matrix
        order = target.row_order(source, weight)
        return formats.get(format_).encode(matrix if order is None else matrix[order])

    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path, force=True) as aside:
        target.write(aside, source, space, space.uniform(own), variant)
    model, original = read_model(path)[0].state_dict(), subject.checkpoint.load().state_dict()
    assert all(torch.equal(model[name], value) for name, value in original.items()), f"{path} is not the original"


def importance_vectors(subject: Subject) -> dict[str, np.ndarray]:
    """Mean squares of each tensor's inputs by its name in the file, (columns,) float32; a tied head's under the embedding."""
    model = subject.checkpoint.load()
    statistics = collect(model, architecture_of(model), subject.weights, subject.segments.calibration, progress=Silent())
    config = subject.checkpoint.config
    return {
        str(file_name(config, weight.name)): statistics[weight.input].diagonal.contiguous().numpy()
        for weight in subject.weights
        if weight.input is not None
    }


def quantised(subject: Subject, source: Path, importance: Path, preset: str) -> Outcome:
    """One preset in a process of its own, read back and measured."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, f"{preset}.gguf")
        paths = (source.absolute(), output, "--importance", importance.absolute())
        command = [sys.executable, "-m", "peers.llamacpp", *paths, "--preset", preset]
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run(command, check=False, cwd=BENCHMARKS, capture_output=True, text=True, errors="replace")
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        if run.returncode or not output.is_file():
            return Refused(PEER, preset, _reason(run.stderr))
        quality, losses = evaluate(read_model(output)[0], subject.reference)
        types, stored = contents(output)
        return Result(
            peer=PEER,
            setting=preset,
            bytes_=output.stat().st_size,
            bits=8 * stored / subject.num_parameters,
            quality=quality,
            losses=losses,
            seconds=ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime,
            detail=types,
        )


def contents(path: Path) -> tuple[str, int]:
    """How many matrices of each type a GGUF file holds, in words, and the bytes of all its tensors."""
    tensors = gguf.GGUFReader(path).tensors
    types = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    return ", ".join(f"{count} {name}" for name, count in types.most_common()), sum(int(tensor.n_bytes) for tensor in tensors)


def _reason(log: str) -> str:
    """The last line in which llama.cpp says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line for word in ("failed", "error", "ASSERT", "missing", "require"))]
    return (telling or lines or ["no message"])[-1]
