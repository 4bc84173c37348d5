"""A fit that is killed at any moment, or whose disk fills up, goes on and ends with the same bytes.

python benchmarks/kill.py [--kills N]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from table import Row, Section, finish_page

KILLS, DISKS = 100, 10
REFINED_SHARE = 0.1
"""Of the runs, at high effort, which take several times as long."""
SETTINGS = ("--formats", "Q8_0,Q4_K", "--segments", "8", "--length", "32", "--effort", "low")
REFINING = ("--formats", "Q8_0,Q2_K", "--segments", "8", "--length", "32", "--effort", "high")
AT_ONCE = 2
"""Runs side by side, each with one thread."""


def start(output: Path, settings: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "anyfit", "fit", "-o", str(output), *settings]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=variables, start_new_session=True)


def content(folder: Path) -> dict[str, str]:
    """{path below it: hash} of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: what it leaves, and how long it takes once its journal is open."""

    settings: Sequence[str]
    files: dict[str, str]
    seconds: float

    @classmethod
    def of(cls, settings: Sequence[str]) -> Whole:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "whole.family")
            _finish(start(output, settings))  # what is compiled on first use is so now
            output.rename(Path(folder, "first.family"))
            process = start(output, settings)
            _wait_for_journal(process, output)
            began = time.perf_counter()
            _finish(process)
            return cls(settings, content(output), time.perf_counter() - began)


@dataclass(frozen=True)
class Killed:
    """One run that was killed so often, then continued: whether the bytes are the same, and what is left besides the family."""

    times: int
    same: bool
    left: tuple[str, ...]
    found: str
    """What was there when it was last killed."""


def killed(whole: Whole, seed: int) -> Killed:
    """Killed once or twice. A run that ends before its moment came begins anew: it was not killed."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        output, wanted, times = Path(folder, "killed.family"), rng.choice((1, 2)), 0
        found = "nothing"
        while times < wanted:
            process = start(output, whole.settings)
            _wait_for_journal(process, output)
            try:
                process.wait(rng.uniform(0, whole.seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                times += 1
                found = _stage(output)
                if output.exists():  # it was done, but for its farewell
                    break
                continue
            assert process.returncode == 0, process.communicate()[1]
            subprocess.run(["rm", "-r", str(output)], check=True)
        if output.exists():
            return Killed(times, content(output) == whole.files, _left(output), "the family")
        _finish(start(output, whole.settings))
        return Killed(times, content(output) == whole.files, _left(output), found)


def _stage(output: Path) -> str:
    partial = output.with_name(output.name + ".partial")
    names = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    for name, stage in (
        ("family.json", "closing"),
        ("source", "keeping the source"),
        ("refined", "refining"),
        ("points", "measuring"),
        ("table.json", "measuring"),
        ("calibration", "encoding"),
        ("variants", "scoring"),
        ("journal.json", "beginning"),
    ):
        if name in names:
            return stage
    return "the family" if output.exists() else "nothing"


def _wait_for_journal(process: subprocess.Popen[str], output: Path) -> None:
    """What comes before, importing mostly, writes nothing."""
    journal = output.with_name(output.name + ".partial") / "journal.json"
    while process.poll() is None and not journal.exists():
        time.sleep(0.01)


def _left(output: Path) -> tuple[str, ...]:
    """Anything beside the family, and anything temporary in it."""
    beside = [path.name for path in output.parent.iterdir() if path != output]
    inside = [path.name for path in output.rglob("*") if path.name.startswith(".") or path.name.endswith((".partial", ".states"))]
    return tuple(beside + inside)


def _finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def kill_section(kills: int) -> Section:
    rows = []
    for name, settings, share in (("low effort", SETTINGS, 1 - REFINED_SHARE), ("high effort", REFINING, REFINED_SHARE)):
        whole, number = Whole.of(settings), max(1, round(share * kills))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(lambda seed, w=whole: killed(w, seed), range(number)))
        stages: dict[str, int] = {}
        for one in found:
            stages[one.found] = stages.get(one.found, 0) + 1
        same, clean = sum(one.same for one in found), sum(not one.left for one in found)
        when = ", ".join(f"{stage} {count}" for stage, count in sorted(stages.items(), key=lambda item: -item[1]))
        cells = (name, f"{whole.seconds:.0f}", f"{number} ({sum(one.times for one in found)} kills)", f"{same}", f"{clean}", when)
        print("  ".join(cells), flush=True)
        rows.append(Row(cells, holds=same == clean == number))
    header = (
        "run",
        "seconds undisturbed, from the journal on",
        "continued runs",
        "with the same bytes",
        "with nothing left behind",
        "last killed while",
    )
    remark = (
        "SIGKILL at a random moment after the journal was opened, once or twice in a run; then the same command again. "
        "Compared is every file of the family."
    )
    return Section("Killed", header, rows, (remark,))


@contextmanager
def disk(size: int) -> Iterator[Path]:
    """A disk of so many bytes."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def disk_section() -> Section:
    header = ("disk", "exit status", "said", "full while", "under the final name", "continued with room: same bytes")
    if os.geteuid() != 0:
        return Section("Full disk", header, [], ("Not run: only root may mount a small disk.",))
    rows, whole = [], Whole.of(SETTINGS)
    for index in range(DISKS):
        size = int(60_000 * 250 ** (index / (DISKS - 1)))
        with disk(size) as folder:
            output = folder / "full.family"
            process = start(output, SETTINGS)
            errors = process.communicate()[1]
            said = next((line for line in errors.splitlines() if line.startswith("error")), "")
            stage, final = _stage(output), output.exists()
            subprocess.run(["mount", "-o", "remount,size=1G", str(folder)], check=True)
            if not final:
                _finish(start(output, SETTINGS))
            same = content(output) == whole.files and not _left(output)
        told = "disk is full" in said
        cells = (
            f"{size / 1e6:.2f} MB",
            str(process.returncode),
            said[:60],
            stage,
            "the family" if final else "nothing",
            "yes" if same else "no",
        )
        print("  ".join(cells), flush=True)
        rows.append(Row(cells, holds=same and (process.returncode == 0 if final else told and process.returncode == 2)))
    return Section("Full disk", header, rows, ("A disk in memory of each size, filled by the run itself; then it is made larger.",))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=KILLS, help=f"continued runs (default {KILLS})")
    args = parser.parse_args()
    sections = [disk_section(), kill_section(args.kills)]
    return finish_page("kill", "Killed runs and full disks", "make bench-kill", sections)


if __name__ == "__main__":
    sys.exit(main())
