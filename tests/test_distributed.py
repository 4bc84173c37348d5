"""Several processes make the very family that one makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import anyfit
from anyfit.core.errors import UserError
from anyfit.distributed import Group, exact
from anyfit.encoding import FOLDER
from anyfit.testing.models import save_tiny, tiny_text

# Batches of one segment, so that there is something to share.
PROGRAM = """
import json, sys
from anyfit import finalists, streaming
from anyfit.searchers import evolution
streaming.TOKENS_AT_ONCE, finalists.NUM_FINALISTS, evolution.GENERATIONS = 32, 3, 1
import anyfit
from anyfit.family.store import Store
from anyfit.distributed import group
if sys.argv[4] != "whole" and not group().first:
    writing = Store.writing
    def killing(store, weight, shapes):
        if weight.startswith("model.layers.1"):
            raise KeyboardInterrupt
        return writing(store, weight, shapes)
    Store.writing = killing
anyfit.fit(sys.argv[1], data=sys.argv[2], output=sys.argv[3], formats=("Q8_0", "Q2_K"), length=32, segments=6, effort=sys.argv[5],
           search="evolution")
"""


# Counts the windows that this process trains on, and the codes that it holds.
TRAINING = """
import sys
from dataclasses import replace
from pathlib import Path
from anyfit import finalists, pipeline, streaming
streaming.TOKENS_AT_ONCE, finalists.NUM_FINALISTS, pipeline.NUM_PROBE_SEGMENTS = 32, 3, 2
import anyfit
from anyfit.distributed import group
from anyfit.elastic.linear import ElasticNetwork
from anyfit.recipes import recipes
from anyfit.trainers import loop
from anyfit.trainers.losses import Divergence
loop.EVERY = 1
folder, work, held, outputs, make = Path(sys.argv[3]), [], [], Divergence.outputs, ElasticNetwork.__init__
def made(network, *rest):
    make(network, *rest)
    held.extend(len(variant.codes.to_local() if network.sharded else variant.codes) for variant in network.variants().values())
ElasticNetwork.__init__ = made
Divergence.outputs = lambda self, batch: (work.extend(batch.samples), outputs(self, batch))[1]
for name, formats in {"llm-qfa": "int4_offset", "double-rounding": "int4_sym", "pv-tuning": "int3_asym"}.items():
    work.clear()
    how = recipes.get(name).training
    settings = replace(how.settings, num_steps=3, batch_size=5, patience=9)
    recipes.get(name).__dict__["training"] = replace(how, settings=settings)
    formats = ("int8_sym", formats, formats.replace("4", "2").replace("3", "2"))
    anyfit.fit(sys.argv[1], data=sys.argv[2], output=folder / f"{name}.family", target="transformers", formats=formats, recipe=name,
               length=32, segments=6)
    (folder / f"{name}.{group().rank}").write_text(str(len(work)))
(folder / f"held.{group().rank}").write_text(str(sum(held)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    save_tiny(folder / "model", tie_word_embeddings=True)
    (folder / "notes.txt").write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)))
    (folder / "program.py").write_text(PROGRAM)
    (folder / "training.py").write_text(TRAINING)
    return folder


def run(
    folder: Path, name: str, processes: int, *, how: str = "whole", effort: str = "low", program: str = "program.py"
) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    arguments = [str(folder / part) for part in (program, "model", "notes.txt", name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, *arguments, how, effort], capture_output=True, text=True, env=environment, check=False, timeout=300
    )


def digest(path: Path) -> str:
    return anyfit.Family.open(path).digest


def test_the_same_family_whatever_the_number_of_processes_and_after_a_kill(folder: Path) -> None:
    for name, processes in (("one.family", 1), ("two.family", 2)):
        made = run(folder, name, processes)
        assert made.returncode == 0, made.stderr
    assert digest(folder / "two.family") == digest(folder / "one.family")
    assert run(folder, "killed.family", 2, how="killed").returncode != 0
    partial = folder / "killed.family.partial"
    assert {path.name for path in (partial / FOLDER).iterdir()} == {"1-of-2", "2-of-2"}
    # One process goes on with what two have begun.
    made = run(folder, "killed.family", 1)
    assert made.returncode == 0, made.stderr
    assert digest(folder / "killed.family") == digest(folder / "one.family")
    assert not partial.exists() and not (folder / "killed.family" / FOLDER).exists()


def test_what_trains_is_shared_and_comes_to_the_same(folder: Path) -> None:
    """Five windows a step in micro-batches of two, so that one of two processes has less to do; where both hold the network together, it
    runs in step for nothing."""
    for name, processes in (("alone", 1), ("both", 2)):
        (folder / name).mkdir()
        made = run(folder, name, processes, program="training.py")
        assert made.returncode == 0, made.stderr
    for recipe, whole, shares in (("llm-qfa", 15, (9, 9)), ("double-rounding", 45, (27, 18)), ("pv-tuning", 30, (15, 15))):
        assert digest(folder / "both" / f"{recipe}.family") == digest(folder / "alone" / f"{recipe}.family"), recipe
        assert int((folder / "alone" / f"{recipe}.0").read_text()) == whole
        assert tuple(int((folder / "both" / f"{recipe}.{rank}").read_text()) for rank in (0, 1)) == shares, recipe
    held = int((folder / "alone" / "held.0").read_text())
    assert [int((folder / "both" / f"held.{rank}").read_text()) for rank in (0, 1)] == [held // 2, held // 2], "rows of codes"


def test_too_little_text_to_share(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyfit import api

    monkeypatch.setattr(api, "group", lambda: Group(0, 3))
    with pytest.raises(UserError, match="3 processes can't share 1 batches"):
        api.prepare(folder / "model", data=folder / "notes.txt", length=32, segments=6)


def test_shares_are_everything_once() -> None:
    items = list(range(7))
    for size in (1, 2, 3, 7, 9):
        groups = [Group(rank, size) for rank in range(size)]
        assert [item for group in groups for item in group.share(items)] == items
        assert all(sum(group.owns(index) for group in groups) == 1 for index in items)


def test_exact_sums_are_the_same_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(500, generator=generator) * 10 ** torch.randn(500, generator=generator) for _ in range(300)]
    largest = max(float(part.abs().max()) for part in parts)
    rounded = [exact(part, largest) for part in parts]
    forwards, backwards = sum(rounded[1:], rounded[0]), sum(rounded[-2::-1], rounded[-1])
    interleaved = sum(rounded[2::2], rounded[0]) + sum(rounded[3::2], rounded[1])
    assert torch.equal(forwards, backwards) and torch.equal(forwards, interleaved)
    assert (forwards - sum(part.double() for part in parts)).abs().max() < 300 * 2**-41 * largest


def test_only_the_first_speaks(folder: Path, tmp_path: Path) -> None:
    environment: dict[str, Any] = {**os.environ, "RANK": "1"}
    command = [sys.executable, "-m", "anyfit", "targets", "--json"]
    quiet = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    spoken = subprocess.run(command, capture_output=True, text=True, env={**environment, "RANK": "0"}, check=True)
    assert not quiet.stdout and json.loads(spoken.stdout)
