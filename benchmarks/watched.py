"""A fit in a process of its own, and what it took: stages, time, memory, disk.

`fit` starts this file as a program. Memory is counted from the interpreter with torch loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Watched:
    """`memory`: peak bytes above `base`, which is the interpreter with torch; `disk`: peak bytes of the unfinished family;
    `seconds` of the whole fit and of each of its `stages`; `peaks`: memory by stage; `planned`: what `anyfit.plan` said before."""

    base: int
    memory: int
    disk: int
    seconds: float
    stages: dict[str, float]
    peaks: dict[str, int]
    planned: dict[str, float]


FEW_FINALISTS, FEW_HELD_OUT = 2, 8
"""What is measured in the end, and on how many segments each, where that isn't what the benchmark is about."""


def fit(model: Path | None, output: Path, *, few: bool = False, plan: bool = True, **wishes: Any) -> Watched:
    """Plan if asked to, then fit anew, in other processes. `few`: measure little in the end."""
    command = [sys.executable, __file__, "--output", str(output), "--wishes", json.dumps(wishes), *(["--few"] if few else [])]
    command += ["--model", str(model)] if model else []

    def run(*more: str) -> Any:
        return json.loads(subprocess.run([*command, *more], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])

    planned = run("--plan") if plan else {}
    return Watched(**run() | {"planned": planned})


class _Stages:
    """An `anyfit.progress.Progress` that keeps times and peaks of memory above `base`."""

    def __init__(self, base: int) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._base = base
        self.between()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Any]:
        self.between()
        began = time.perf_counter()
        yield self
        self.seconds[name] = time.perf_counter() - began
        self.peaks[name] = _status("VmHWM") - self._base
        Path("/proc/self/clear_refs").write_text("5")

    def between(self) -> None:
        """Count anew; what was held since the last stage is kept."""
        self.peaks["between"] = max(self.peaks.get("between", 0), _status("VmHWM") - self._base)
        Path("/proc/self/clear_refs").write_text("5")

    def advance(self, n: int = 1, detail: str = "") -> None:
        return None

    def note(self, text: str) -> None:
        return None


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])


def main() -> None:
    import torch  # noqa: F401 (what memory is counted from)

    base = _status("VmRSS")
    from anyfit import api, estimates, finalists

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--wishes", type=json.loads)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--plan", action="store_true")
    args = parser.parse_args()
    if args.few:
        finalists.NUM_FINALISTS = estimates.NUM_FINALISTS = FEW_FINALISTS
        api.NUM_SEARCH = api.NUM_REPORT = FEW_HELD_OUT
    if args.plan:
        plan = api.plan(args.model, **args.wishes)
        print(json.dumps({"memory": plan.memory_bytes, "disk": plan.disk_bytes, "seconds": plan.seconds}))
        return
    partial, stages, most = args.output.with_name(args.output.name + ".partial"), _Stages(base), [0]

    def watch() -> None:
        while True:
            with suppress(OSError):  # a file was there a moment ago
                most.append(sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()))
            most[:] = [max(most)]
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    api.fit(args.model, output=args.output, restart=True, force=True, progress=stages, **args.wishes)
    seconds = time.perf_counter() - began
    stages.between()
    memory, disk = max(stages.peaks.values()), max(most)
    found = Watched(base, memory, disk, seconds, stages.seconds, stages.peaks, {})
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
