"""Where a run computes: this machine's processors, or one graphics processor for each process.

On a graphics processor networks run, second moments are summed and factorised, columns are rounded and variants trained. Scales are
searched, entries of codebooks chosen and bytes packed by the processors all the same, at the same time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from anyfit.core import memory
from anyfit.core.errors import UserError

AUTO = "auto"
CPU = torch.device("cpu")
NAMES = (AUTO, "cpu", "cuda")
SHARE_OF_FREE = 0.75
"""Of the memory that nobody uses, what a run may take unless it is told."""


def device(name: str) -> torch.device:
    """This process's; `auto` is a graphics processor where there is one. Raises `UserError`."""
    if name not in NAMES:
        raise UserError(f"There is no device {name!r}.", remedy=f"There are: {', '.join(NAMES)}.")
    reason = _lacking()
    if name == "cpu" or (name == AUTO and reason):
        return CPU
    if reason:
        raise UserError(f"The device cuda can't be used: {reason}.", remedy="Say --device cpu.")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, products may differ from one run to the next
    torch.cuda.init()  # what asks for its memory doesn't
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def moved(model: PreTrainedModel, where: torch.device) -> PreTrainedModel:
    """The model itself, its numbers on the device."""
    model.to(where)
    return model


def _lacking() -> str | None:
    """Why no graphics processor can be used."""
    if not torch.cuda.is_available():
        return "torch finds no graphics processor that it was built for"
    if importlib.util.find_spec("triton") is None:
        return "triton, which compiles for it, isn't installed"
    return None


def free(where: torch.device) -> int | None:
    """Bytes of its memory that this process could still take; None where the system doesn't say."""
    if where.type == "cpu":
        return memory.free()
    return torch.cuda.mem_get_info(where)[0] + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)


def usable(where: torch.device, given: int | None = None) -> int | None:
    """Bytes of memory that a run may take there: what was given, or a share of what is free; None where the system doesn't say what that
    is."""
    if given is not None:
        return given
    found = free(where)
    return None if found is None else int(SHARE_OF_FREE * found)


def sharing(where: torch.device, processes: int) -> int:
    """How many of a machine's processes use the same device."""
    return processes if where.type == "cpu" else -(-processes // torch.cuda.device_count())


class Peak:
    """The most memory of a graphics processor that this process's tensors have held since the object was made; 0 for the CPU."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)

    @property
    def bytes_(self) -> int:
        return torch.cuda.max_memory_allocated(self._where) if self._where.type == "cuda" else 0


def limit(where: torch.device, most: int) -> None:
    """Let this process hold no more than `most` bytes of a graphics processor's memory."""
    if where.type == "cuda":
        total = torch.cuda.get_device_properties(where).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), where)


@contextmanager
def repeatable(where: torch.device) -> Iterator[None]:
    """For gradients: on a graphics processor, the usual ways back through attention and through indexing add up in any order."""
    if where.type == "cpu":
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def matrix_speed(where: torch.device) -> Iterator[None]:
    """For passes over calibration text: factors of float32 products are rounded to what matrix units take, where there are such; sums
    stay float32.

    bfloat16 on processors, two to three times as fast; TF32, which has three bits more, on graphics processors. A moment's error is a
    thousandth of it at most, far below that of a sample of text.
    """
    settings: Any
    if where.type == "cuda":
        settings, fast = torch.backends.cuda.matmul, "tf32"
    elif torch.cpu.get_capabilities().get("avx512_bf16"):
        settings, fast = torch.backends.mkldnn.matmul, "bf16"  # type: ignore[attr-defined]
    else:
        yield
        return
    before, settings.fp32_precision = settings.fp32_precision, fast
    try:
        yield
    finally:
        settings.fp32_precision = before
