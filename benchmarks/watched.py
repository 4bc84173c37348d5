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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Watched:
    """`memory`: peak bytes above `base`, which is the interpreter with torch; `disk`: peak bytes of the unfinished family;
    `seconds` of the whole fit and of each of its `stages`."""

    base: int
    memory: int
    disk: int
    seconds: float
    stages: dict[str, float]


def fit(model: Path, output: Path, data: Path, formats: Sequence[str], length: int, segments: int, effort: str = "low") -> Watched:
    """Fit anew, in another process."""
    wishes = {"data": str(data), "formats": list(formats), "length": length, "segments": segments, "effort": effort}
    command = [sys.executable, __file__, "--model", str(model), "--output", str(output), "--wishes", json.dumps(wishes)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Watched(**json.loads(finished.stdout.splitlines()[-1]))


class _Stages:
    """An `anyfit.progress.Progress` that keeps times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Any]:
        began = time.perf_counter()
        yield self
        self.seconds[name] = time.perf_counter() - began

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
    import anyfit

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--wishes", type=json.loads)
    args = parser.parse_args()
    partial, stages, most = args.output.with_name(args.output.name + ".partial"), _Stages(), [0]

    def watch() -> None:
        while True:
            with suppress(OSError):  # a file was there a moment ago
                most.append(sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()))
            most[:] = [max(most)]
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    anyfit.fit(args.model, output=args.output, restart=True, force=True, progress=stages, **args.wishes)
    seconds = time.perf_counter() - began
    print(json.dumps(asdict(Watched(base, _status("VmHWM") - base, max(most), seconds, stages.seconds))))


if __name__ == "__main__":
    main()
