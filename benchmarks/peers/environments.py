"""Peers that have an environment of their own, and plain rounding: started and measured here."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from peers.presets import BENCHMARKS
from peers.results import NOT_RUN, Keep, Outcome, Refused, Result, evaluate, kept
from peers.subjects import Subject

ENVIRONMENTS = ("autoround", "gptqmodel", "llmcompressor", "hqq")
ROUNDING = "rounding"
LAYOUTS = ((4, 64), (3, 64), (2, 64))
"""(bits, columns that share a scale)."""
_SMALLEST_HALF = 2.0**-24
KEPT_BYTES = 2
"""Of each number that these peers don't quantise: embedding, head, norms."""


@dataclass(frozen=True)
class Made:
    """Quantised linears, decoded, by parameter name, and what storing them takes."""

    weights: Mapping[str, Tensor]
    formula_bytes: int
    file_bytes: int | None
    seconds: float


def outcomes(subject: Subject, peer: str, environments: Path, *, keep: Keep) -> Iterator[Outcome]:
    """One peer at every layout. `subject` must be one whose rows are whole groups."""
    program = BENCHMARKS / "peers" / f"{'environments' if peer == ROUNDING else peer}.py"
    key = {
        "model": subject.checkpoint.digest,
        "text": subject.segments.digest,
        "program": program.read_text(encoding="utf-8"),
        "version": torch.__version__ if peer == ROUNDING else installed(environments / peer),
    }
    if peer == ROUNDING and keep is Keep.ONLY:
        keep = Keep.REUSE  # it takes no time
    for bits, group in LAYOUTS:
        path = subject.work / peer / f"{bits}-{group}.json"
        own = {**key, "bits": bits, "group": group}
        found = kept(path, own, lambda b=bits, g=group: _outcome(subject, peer, b, g, environments), keep=keep)
        yield found or Refused(peer, f"w{bits} g{group}", NOT_RUN)


def installed(environment: Path) -> list[str]:
    """Names and versions of everything in an environment: a folder each."""
    return sorted(folder.name for folder in environment.glob("lib/python*/site-packages/*.dist-info"))


def _outcome(subject: Subject, peer: str, bits: int, group: int, environments: Path) -> Outcome:
    setting = f"w{bits} g{group}"
    made = rounded(subject, bits, group) if peer == ROUNDING else run(subject, peer, bits, group, environments)
    if isinstance(made, str):
        return Refused(peer, setting, made)
    expected = {weight.name for weight in subject.block_weights}
    assert made.weights.keys() == expected, f"{peer} left other matrices than it was asked for"
    model = subject.checkpoint.load()
    with torch.no_grad():
        for name, value in made.weights.items():
            model.get_parameter(name).copy_(value)
    quality, losses = evaluate(model, subject.reference)
    rest = subject.num_parameters - sum(weight.num_weights for weight in subject.block_weights)
    formula = made.formula_bytes + KEPT_BYTES * rest
    stored = min(formula, made.file_bytes or formula)
    detail = f"{formula} B by formula" + (f", its file {made.file_bytes} B" if made.file_bytes else "")
    return Result(peer, setting, stored, 8 * stored / subject.num_parameters, quality, losses, made.seconds, detail)


def run(subject: Subject, peer: str, bits: int, group: int, environments: Path) -> Made | str:
    """What the peer's program makes; where it fails, the last line that it printed."""
    calibration, output = subject.work / "calibration.npy", subject.work / peer / f"{bits}-{group}"
    np.save(calibration, subject.segments.calibration.numpy())
    options: dict[str, Any] = {"model": subject.folder, "calibration": calibration, "bits": bits, "group": group, "out": output}
    python = (environments / peer / "bin" / "python").absolute()
    command = [str(python), "-m", f"peers.{peer}", *(text for name, value in options.items() for text in (f"--{name}", str(_whole(value))))]
    variables = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    output.mkdir(parents=True, exist_ok=True)
    # in the output's folder, as some leave logs wherever they run
    finished = subprocess.run(command, check=False, cwd=output, capture_output=True, text=True, errors="replace", env=variables)
    if finished.returncode:
        return (finished.stderr.strip().splitlines() or ["no message"])[-1]
    outcome = json.loads((output / "outcome.json").read_text(encoding="utf-8"))
    weights = load_file(output / "weights.safetensors")
    return Made(weights, outcome["formula_bytes"], outcome["file_bytes"], outcome["cpu_seconds"])


def _whole(value: Any) -> Any:
    """The program runs in another folder."""
    return value.absolute() if isinstance(value, Path) else value


def rounded(subject: Subject, bits: int, group: int) -> Made:
    """Each group between its smallest and largest weight, zero among them; 16-bit scale, whole zero point."""
    began = time.process_time()
    weights = {}
    for weight in subject.block_weights:
        groups = subject.checkpoint.read(weight.name).float().unflatten(1, (-1, group))
        low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(_SMALLEST_HALF)
        zero = (-low / scale).round()
        codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
        weights[weight.name] = ((codes - zero) * scale).flatten(1)
    seconds = time.process_time() - began
    num_weights = sum(weight.numel() for weight in weights.values())
    return Made(weights, (num_weights * bits + num_weights // group * (16 + bits)) // 8, None, seconds)
