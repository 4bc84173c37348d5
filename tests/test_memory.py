"""What a fit would take, and refusing what is too much."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import anyfit
from anyfit import api, estimates
from anyfit.core import memory
from anyfit.core.errors import BudgetError, UserError
from anyfit.testing.models import save_tiny, tiny_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    save_tiny(folder / "model")
    (folder / "notes.txt").write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)))
    return folder


def test_a_peak_is_seen_and_then_forgotten() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux counts anew")
    before = memory.Peak().bytes_
    held = np.ones(25_000_000)  # 200 MB
    peak = memory.Peak()
    assert peak.bytes_ >= before + 150e6
    del held
    memory.release()
    assert memory.Peak().bytes_ < before + 100e6


KEEPING = """
import ctypes, sys
from pathlib import Path
from anyfit.core import memory
if sys.argv[1] == "at once":
    memory.return_at_once()
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def taken(size):
    place = library.malloc(size)
    ctypes.memset(place, 1, size)
    return place
library.free(taken(24 << 20))  # from now on the library keeps blocks of this size
large, small = zip(*((taken(8 << 20), taken(100_000)) for _ in range(20)))
before = held()
for place in large:
    library.free(place)
print(before - held())
"""


@pytest.mark.skipif(memory._library() is None, reason="only glibc keeps blocks like that")
def test_large_blocks_go_back_at_once() -> None:
    found = {}
    for how in ("later", "at once"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run([sys.executable, "-c", KEEPING, how], capture_output=True, text=True, check=True, env=environment)
        found[how] = int(done.stdout)
    assert found["at once"] > 150e6 > 60e6 > found["later"], found


def test_free_memory_is_less_than_all() -> None:
    free = memory.free()
    assert free is None or 0 < free < 1e15


def test_in_a_container_its_limit_counts_and_files_that_were_read_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("50000000\n")
    (tmp_path / "memory.current").write_text("40000000\n")
    (tmp_path / "memory.stat").write_text("anon 10000000\nactive_file 20000000\ninactive_file 9000000\n")
    assert memory.free() == 39_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert (memory.free() or 10**9) > 39_000_000


def test_a_limit_that_is_too_low_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    wishes = {"data": folder / "notes.txt", "formats": ("Q8_0", "Q4_K"), "length": 32, "segments": 8}
    with pytest.raises(UserError, match=r"takes .* of memory, and 50\.00 MB may be used\. Say --memory \d"):
        anyfit.fit(folder / "model", output=tmp_path / "made.family", memory="50 MB", **wishes)
    assert not list(tmp_path.iterdir())
    needs = estimates.needs(api.prepare(folder / "model", **wishes))
    assert 1e8 < needs.memory < 3e9 and needs.seconds > 0
    anyfit.fit(folder / "model", output=tmp_path / "made.family", memory=f"{needs.memory * 2} B", **wishes)


def test_networks_of_very_small_matrices_are_planned(folder: Path, tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    plan = anyfit.plan(small, data=folder / "notes.txt", formats=("F16",), length=32, segments=4)
    assert plan.memory_bytes > 0 and plan.seconds > 0


def test_a_limit_is_bytes() -> None:
    with pytest.raises(UserError, match="not in bytes"):
        anyfit.fit(memory="3 bits")
    with pytest.raises(BudgetError, match="can't be read"):
        anyfit.fit(memory="much")


def test_refining_counts_the_whole_network(folder: Path) -> None:
    wishes = {"data": folder / "notes.txt", "formats": ("Q8_0", "Q4_K"), "length": 32, "segments": 8}
    low, high = (estimates.needs(api.prepare(folder / "model", effort=effort, **wishes)).memory for effort in ("low", "high"))
    assert high > low
