"""Memory of training where processes hold the networks together: one process against two, on a synthetic Llama.

This file is also the program that is measured: it trains what has been encoded, and says what that took.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthetic import Shape, write
from table import Row, Section

SHAPE = Shape(width=1024, num_blocks=16, vocabulary=2048)
FORMATS = ("int8_asym", "int2_offset", "int4_offset")
STEPS, RANK, LENGTH, SEGMENTS, HELD_OUT = 2, 8, 64, 32, 4
LEAST = 0.7
"""Of one process's memory, that each of two may take: half of what is shared out, and all of the rest."""


def section() -> Section:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(SHAPE, folder / "model")
        (folder / "notes.txt").write_text("\n\n".join(_text(seed) for seed in range(60)), encoding="utf-8")
        _run(folder, "encoded", 1)
        found = {}
        for processes in (1, 2):
            shutil.copytree(folder / "encoded", folder / str(processes))
            found[processes] = _run(folder, str(processes), processes)
            print(processes, found[processes], flush=True)
    alone, both = found[1], found[2]
    most = {processes: max(one["memory"] for one in own) for processes, own in found.items()}
    same = {one["digest"] for own in found.values() for one in own}
    rows = [
        Row(("1", f"{most[1] / 1e6:.0f}", f"{alone[0]['seconds']:.0f}", alone[0]["digest"][:12])),
        Row(
            ("2", " and ".join(f"{one['memory'] / 1e6:.0f}" for one in both), f"{both[0]['seconds']:.0f}", both[0]["digest"][:12]),
            most[2] <= LEAST * most[1] and len(same) == 1,
        ),
    ]
    remark = (
        f"A Llama of random weights, {SHAPE.width} wide, {SHAPE.num_blocks} blocks, in {', '.join(FORMATS[1:])}, rounded to nearest; "
        f"{STEPS} steps of training with adapters of rank {RANK}. Peak memory of each process while it trains, above the interpreter with "
        "all modules loaded. Two processes hold the original and the codes together (FSDP2), and one block at a time whole; adapters and "
        f"their averages are in both. Holds with at most {LEAST:g} of one process's memory and the same bytes in the store. Seconds are "
        "wall time, of as many cores as there are processes at best."
    )
    return Section("Memory of processes that train together", ("processes", "MB in each", "seconds", "trained variants"), rows, (remark,))


def _text(seed: int) -> str:
    from anyfit.testing.models import tiny_text

    return tiny_text(400, seed=seed)


def _run(folder: Path, name: str, processes: int) -> list[dict[str, Any]]:
    """What each process says."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *start, __file__, str(folder), name], check=True, env=environment)
    return [json.loads((folder / name / f"{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    import torch.distributed.fsdp  # noqa: F401 (what memory is counted from)

    from anyfit import api
    from anyfit.core import memory
    from anyfit.core.files import sha256
    from anyfit.family.store import VARIANTS, Store
    from anyfit.recipes.base import Training
    from anyfit.trainers.loop import Settings

    base, api.NUM_SEARCH, api.NUM_REPORT = memory.Peak().bytes_, HELD_OUT, HELD_OUT
    folder, name = Path(sys.argv[1]), sys.argv[2]
    data, target = folder / "notes.txt", "transformers"
    run = api.prepare(folder / "model", data=data, target=target, formats=FORMATS, recipe="llm-qfa", length=LENGTH, segments=SEGMENTS)
    settings = Settings(num_steps=STEPS, batch_size=4, micro_batch=2, rank=RANK, num_periods=2)
    assert isinstance(run.recipe.training, Training)
    run.recipe = replace(run.recipe, quantizer="rtn", training=replace(run.recipe.training, settings=settings))
    (folder / name).mkdir(exist_ok=True)
    store = Store(folder / name)
    if not (folder / name / VARIANTS).exists():
        run.encode(store)
    memory.release()
    peak, began = memory.Peak(), time.perf_counter()
    if name != "encoded":
        run.train(store)
    found = {"memory": peak.bytes_ - base, "seconds": time.perf_counter() - began}
    hashes = "".join(sha256(path) for path in sorted((folder / name / VARIANTS).iterdir()))
    digest = hashlib.sha256(hashes.encode()).hexdigest()
    (folder / name / f"{run.group.rank}.json").write_text(json.dumps(found | {"digest": digest}))


if __name__ == "__main__":
    main()
