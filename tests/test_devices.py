"""The same results wherever a run computes. What needs a graphics processor is skipped where there is none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anyfit
from anyfit import api, devices
from anyfit.core.errors import UserError
from anyfit.testing.models import save_tiny, tiny_text

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics processor here")
FORMATS = ("Q2_K", "Q4_K", "Q8_0", "int3_sym", "IQ4_NL", "MXFP4", "TQ2_0")
INTERPRETED = """
import sys
from anyfit.formats import formats
from anyfit.quantizers import gptq, gptq_cuda
from anyfit.testing import devices

for number, name in enumerate(sys.argv[1:]):
    case = devices.rounding_case(formats.get(name), 64 if number % 2 else 24, 37, seed=number)
    compiled, (order, grid, rows) = case.rounded("cpu"), case.on("cpu")
    gptq_cuda.round_lanes(case.format_, order, grid, rows)
    for part, one, other in zip(rows._fields, compiled, rows):
        assert devices.bits(one).equal(devices.bits(other)), (name, part)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton isn't installed")
def test_the_kernel_rounds_as_the_compiled_loops_do_to_the_bit() -> None:
    """By Triton's interpreter, which needs no graphics processor."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, *FORMATS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_device_is_known_by_its_name() -> None:
    assert devices.device("cpu") == devices.CPU
    with pytest.raises(UserError, match=r"no device 'tpu'.*There are: auto, cpu, cuda"):
        devices.device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a graphics processor")
def test_without_a_graphics_processor() -> None:
    assert devices.device("auto") == devices.CPU
    with pytest.raises(UserError, match=r"can't be used.*--device cpu"):
        api.prepare(device="cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices")
    save_tiny(folder / "model")
    (folder / "notes.txt").write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)))
    return folder


@needs_cuda
@pytest.mark.parametrize("effort", ["low", "high"])
def test_a_family_is_nearly_the_same(folder: Path, tmp_path: Path, effort: str) -> None:
    made = {
        where: anyfit.fit(
            folder / "model",
            data=folder / "notes.txt",
            output=tmp_path / f"{where}.family",
            formats=("Q8_0", "Q4_K"),
            length=32,
            segments=8,
            effort=effort,
            device=where,
        )
        for where in ("cpu", "cuda")
    }
    quality = [{point.uniform: point.report.kl_mean for point in family.points if point.uniform} for family in made.values()]
    assert quality[0] == pytest.approx(quality[1], rel=0.05)
    assert made["cpu"].provenance["device"] == "cpu" and made["cuda"].provenance["device"] == "cuda"


@needs_cuda
def test_too_little_memory_of_a_graphics_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="may be used"):
        anyfit.fit(folder / "model", data=folder / "notes.txt", output=tmp_path / "made.family", device="cuda", memory="1 MB")
    assert not list(tmp_path.iterdir())
