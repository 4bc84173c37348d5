"""What the programs that run in a peer's own environment share. Needs torch, transformers and safetensors only.

    python -m peers.NAME --model FOLDER --calibration FILE.npy --bits B --group G --out FOLDER

leaves in the output folder the quantised matrices as the peer decodes them, and what the run cost.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS, OUTCOME = "weights.safetensors", "outcome.json"


@dataclass(frozen=True)
class Task:
    """What a peer is asked to do. `calibration`: token ids, (segments, length) int64."""

    model: Path
    calibration: Tensor
    bits: int
    group: int
    out: Path

    @classmethod
    def parse(cls) -> Task:
        parser = argparse.ArgumentParser()
        for name, type_ in {"model": Path, "calibration": Path, "bits": int, "group": int, "out": Path}.items():
            parser.add_argument(f"--{name}", type=type_, required=True)
        args = parser.parse_args()
        args.out.mkdir(parents=True, exist_ok=True)
        return cls(args.model, torch.from_numpy(np.load(args.calibration)).long(), args.bits, args.group, args.out)

    def load(self) -> PreTrainedModel:
        """The original in float32."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.model)

    def finish(
        self, package: str, watch: Stopwatch, weights: Mapping[str, Tensor], *, zero_bits: int, file_bytes: int | None = None
    ) -> None:
        """Write everything down. `weights`: decoded matrices by parameter name; `zero_bits`: of one group's zero point.

        The formula counts what the layout needs at least: packed codes, and a 16-bit scale and a zero point a group.
        `file_bytes`: of the weight files that the peer itself wrote.
        """
        num_weights = sum(weight.numel() for weight in weights.values())
        stored = num_weights * self.bits + num_weights // self.group * (16 + zero_bits)
        save_file({name: weight.detach().float().contiguous() for name, weight in weights.items()}, self.out / WEIGHTS)
        outcome = {
            "package": package,
            "version": version(package),
            "formula_bytes": -(-stored // 8),
            "file_bytes": file_bytes,
            "cpu_seconds": watch.cpu,
            "wall_seconds": watch.wall,
        }
        (self.out / OUTCOME).write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")


class Stopwatch:
    """CPU and wall seconds of a `with` block; CPU time is that of all threads."""

    cpu = wall = 0.0

    def __enter__(self) -> Stopwatch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exception: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linears of the blocks by module path: all but the head."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def weight_bytes(folder: Path) -> int:
    """Of the safetensors files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
