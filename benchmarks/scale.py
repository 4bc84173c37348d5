"""Networks larger than memory: what fitting them takes, against what was planned, against their size, and against the peers.

python benchmarks/scale.py [--environments FOLDER] [--only SECTION]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from peers import environments
from peers.results import our_code
from peers.subjects import Subject
from synthetic import Shape, write
from table import Row, Section, finish_page
from watched import FEW_FINALISTS, FEW_HELD_OUT, Watched, fit

from anyfit.calibration.data import load
from anyfit.checkpoint import Checkpoint
from anyfit.testing.models import tiny_text

WORK = Path(__file__).parent.parent / "build" / "scale"
LARGE, HALF = Shape(2048, 24), Shape(2048, 12)
"""1.19 and 0.66 billion parameters."""
FEW = ("Q8_0", "Q4_K")
FIVE = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K")
LENGTH, SEGMENTS = 64, 32
MOST_MEMORY, MOST_DIFFERENCE = 1.3e9, 0.10
PLANNED_BYTES, PLANNED_TIME = 0.20, 1.5
MOST_BENT = 0.15
RIVALS = ("gptqmodel", "llmcompressor")
RIVAL_SHAPE, RIVAL_SEGMENTS = Shape(1024, 8, vocabulary=1024), 32
GROWING = (Shape(512, 4, vocabulary=512), Shape(512, 8, vocabulary=512), Shape(512, 16, vocabulary=512))
WIDER = (Shape(1024, 4, vocabulary=512), Shape(1024, 8, vocabulary=512), Shape(1024, 16, vocabulary=512))


@cache
def model(shape: Shape) -> Path:
    """Written on first use, and kept."""
    folder = WORK / f"{shape.width}-{shape.num_blocks}-{shape.vocabulary}"
    if not (folder / "tokenizer.json").is_file():
        write(shape, folder)
    return folder


@cache
def text() -> Path:
    path = WORK / "text.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(tiny_text(2000, seed=seed) for seed in range(100)), encoding="utf-8")
    return path


def fitted(shape: Shape, formats: tuple[str, ...] = FEW, segments: int = SEGMENTS, *, again: bool = False) -> Watched:
    """What a fit takes; known from an earlier run where our code is the same, unless it is to be made again."""
    name = f"{shape.width}-{shape.num_blocks}-{shape.vocabulary}-{'-'.join(formats)}-{segments}"
    kept, output = WORK / f"{our_code()}-{name}.json", WORK / f"{name}.family"
    if kept.is_file() and not again:
        return Watched(**json.loads(kept.read_text()))
    try:
        found = fit(
            model(shape),
            output,
            few=True,
            plan=not again,
            data=str(text()),
            formats=formats,
            length=LENGTH,
            segments=segments,
            effort="low",
        )
    finally:
        shutil.rmtree(output, ignore_errors=True)
    if not again:
        kept.write_text(json.dumps(asdict(found)))
    return found


def billions(shape: Shape) -> float:
    return num_parameters(shape) / 1e9


def num_parameters(shape: Shape) -> int:
    return sum(size.numel() for size, _ in Checkpoint.open(model(shape)).tensors().values())


def memory_section() -> Section:
    header = ("network", "weight files", "peak memory above the interpreter with torch", "seconds")
    half, large = fitted(HALF), fitted(LARGE)
    difference = large.memory / half.memory - 1
    rows = [
        Row(_memory_cells(HALF, half), holds=half.memory <= MOST_MEMORY),
        Row(_memory_cells(LARGE, large, f" ({difference:+.1%})"), holds=large.memory <= MOST_MEMORY and abs(difference) <= MOST_DIFFERENCE),
    ]
    remark = (
        f"Llamas of random bfloat16 weights, {LARGE.width} wide; {', '.join(FEW)}, low effort, {SEGMENTS} segments of {LENGTH} tokens, "
        f"{FEW_FINALISTS} finalists measured on {2 * FEW_HELD_OUT} segments. Holds up to {MOST_MEMORY / 1e9:.1f} GB, and where twice the "
        f"blocks take the same within {MOST_DIFFERENCE:.0%}."
    )
    return Section("Memory", header, rows, (remark,))


def _memory_cells(shape: Shape, found: Watched, more: str = "") -> tuple[str, ...]:
    size = Checkpoint.open(model(shape)).bytes_
    cells = (
        f"{billions(shape):.2f} billion parameters, {shape.num_blocks} blocks",
        f"{size / 1e9:.2f} GB",
        f"{found.memory / 1e9:.2f} GB{more}",
        f"{found.seconds:.0f}",
    )
    print("  ".join(cells), flush=True)
    return cells


def plan_section() -> Section:
    header = ("network", "memory planned / taken", "disk planned / taken", "seconds planned / taken")
    rows = [_plan_row(f"{billions(shape):.2f} billion parameters", fitted(shape)) for shape in (HALF, LARGE, GROWING[-1])]
    with tempfile.TemporaryDirectory() as folder:
        rows.append(_plan_row("the embedded default, low effort", fit(None, Path(folder, "default.family"), effort="low")))
    remark = (
        "What `anyfit plan` says before the run, in the same process. "
        f"Memory and disk hold within {PLANNED_BYTES:.0%}, time within a factor of {PLANNED_TIME}."
    )
    return Section("Planned and taken", header, rows, (remark,))


def _plan_row(name: str, taken: Watched) -> Row:
    plan, whole = taken.planned, taken.base + taken.memory
    memory, disk, seconds = plan["memory"] / whole, plan["disk"] / taken.disk, plan["seconds"] / taken.seconds
    cells = (
        name,
        f"{plan['memory'] / 1e9:.2f} / {whole / 1e9:.2f} GB: {memory:.2f}",
        f"{plan['disk'] / 1e9:.3f} / {taken.disk / 1e9:.3f} GB: {disk:.2f}",
        f"{plan['seconds']:.0f} / {taken.seconds:.0f}: {seconds:.2f}",
    )
    print("  ".join(cells), flush=True)
    near = all(abs(ratio - 1) <= PLANNED_BYTES for ratio in (memory, disk))
    return Row(cells, holds=near and 1 / PLANNED_TIME <= seconds <= PLANNED_TIME)


def time_section() -> Section:
    """Where the time goes."""
    header = ("network", "calibrate and encode", "probe units", "backward pass", "measure finalists", "the rest")
    rows = []
    for shape in (HALF, LARGE):
        found = fitted(shape)
        named = [found.stages[name] for name in header[1:-1]]
        shares = [f"{seconds:.0f} s, {seconds / found.seconds:.0%}" for seconds in (*named, found.seconds - sum(named))]
        rows.append(Row((f"{billions(shape):.2f} billion parameters", *shares)))
    return Section("Where the time goes", header, rows)


def size_section() -> Section:
    """Time against the number of blocks, at two widths."""
    header = ("width", "blocks", "million parameters in blocks", "seconds", "seconds if it grew evenly")
    rows = []
    for shapes in (GROWING, WIDER):
        found = [(shape.num_blocks, _quickest(shape)) for shape in shapes]
        (few, short), (more, longer) = found[:2]
        for shape, (blocks, seconds) in zip(shapes, found, strict=True):
            even = short + (longer - short) / (more - few) * (blocks - few)
            millions = (num_parameters(shape) - 2 * shape.vocabulary * shape.width) / 1e6
            cells = (str(shape.width), str(blocks), f"{millions:.1f}", f"{seconds:.1f}", f"{even:.1f}" if blocks > more else "")
            print("  ".join(cells), flush=True)
            rows.append(Row(cells, holds=abs(seconds / even - 1) <= MOST_BENT if blocks > more else None))
    remark = f"The line through the first two numbers of blocks foretells the third within {MOST_BENT:.0%}."
    return Section("Time against size", header, rows, (remark,))


def _quickest(shape: Shape) -> float:
    """Seconds of the best of three runs: whatever else the machine does only adds."""
    return min(fitted(shape, again=True).seconds for _ in range(3))


def rival_section(folder: Path) -> Section:
    """Five formats from one run, and each rival's one 4-bit model, one after another."""
    header = ("who", "makes", "million weights encoded", "wall seconds", "seconds per million and format")
    shape = RIVAL_SHAPE
    checkpoint = Checkpoint.open(model(shape))
    segments = load(text(), checkpoint.tokenizer(), length=LENGTH, num_calibration=RIVAL_SEGMENTS, num_search=16, num_report=32, seed=0)
    subject = Subject(f"synthetic {shape.width}", model(shape), segments, WORK)
    ours = fitted(shape, FIVE, RIVAL_SEGMENTS, again=True).stages["calibrate and encode"]
    own = sum(weight.num_weights for weight in subject.weights) / 1e6
    theirs = {}
    for peer in RIVALS:
        made = environments.run(subject, peer, 4, 128, folder)
        if not isinstance(made, str):
            outcome = json.loads((WORK / peer / "4-128" / "outcome.json").read_text())
            theirs[peer] = outcome["wall_seconds"]
    again = fitted(shape, FIVE, RIVAL_SEGMENTS, again=True).stages["calibrate and encode"]
    ours = sorted((ours, again))[1]  # the slower one
    fastest = min(theirs.values(), default=float("nan"))
    rows = [Row(("anyfit", ", ".join(FIVE), f"{own:.0f}", f"{ours:.0f}", f"{ours / own / len(FIVE):.3f}"), holds=ours <= fastest)]
    blocks = sum(weight.num_weights for weight in subject.block_weights) / 1e6
    rows += [Row((peer, "one 4-bit model", f"{blocks:.0f}", f"{wall:.0f}", f"{wall / blocks:.3f}")) for peer, wall in theirs.items()]
    for row in rows:
        print("  ".join(row.cells), flush=True)
    remark = (
        f"Of {num_parameters(shape) / 1e6:.0f} million parameters, on the same {RIVAL_SEGMENTS} segments of {LENGTH} tokens, in the same "
        "minutes; "
        "of anyfit the slower of two runs, one before and one after the others. Loading and saving aren't counted for the rivals; anyfit's "
        "seconds are those of the stage that calibrates, encodes and writes."
    )
    return Section("Five formats against one", header, rows, (remark,))


@dataclass(frozen=True)
class _Part:
    name: str
    make: Callable[[], Section]


def parts(args: argparse.Namespace) -> Iterator[_Part]:
    yield _Part("rivals", lambda: rival_section(args.environments))
    yield _Part("size", size_section)
    yield _Part("memory", memory_section)
    yield _Part("plan", plan_section)
    yield _Part("time", time_section)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, default=Path("build/peers"), help="where each peer's environment is, by its name")
    parser.add_argument("--only", default=None, help="one of rivals, size, memory, plan, time")
    args = parser.parse_args()
    sections = [part.make() for part in parts(args) if args.only in (None, part.name)]
    return finish_page("scale", "Networks larger than memory", "make bench-scale", sections)


if __name__ == "__main__":
    sys.exit(main())
