"""Whether the latency of a smaller network is what a table of its modules' latencies predicts.

The embedded default, uniformly cut, with other sizes in each block, and with parts left out, one thread. Predicted from the table that
`anyfit measure` makes; then each network is built whole and timed in turn with the uncut one. In every runtime that is installed, for all
tokens at once and for one token after them.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from table import Row, Section, finish_page

from anyfit.checkpoint import Checkpoint
from anyfit.core.errors import RuntimeMissingError
from anyfit.costs.latency import ATTENTION, DECODE, FEED_FORWARD, PREFILL, Setting, Shape
from anyfit.costs.probes import shape_of, sized
from anyfit.costs.stopwatch import Clock, Stopwatch, measure, pinned, sizes
from anyfit.progress import to_stderr
from anyfit.targets import targets
from anyfit.zoo import MODEL

MOST_OFF = 0.07
UNIFORM = ((2, 256), (1, 512), (1, 128))
NUM_MIXED = 2
COPIES = 3
"""Of each network that is timed, the median of which counts: where in memory its numbers come to lie is chance."""
LEFT_OUT = ((2, 512), (0, 512), (2, 0), (0, 0), (1, 256), (0, 96))
"""Groups and width in each block, of which some have only one half or nothing."""


@dataclass(frozen=True)
class Runtime:
    """One runtime, and in what it is timed."""

    target: str
    formats: tuple[str, ...]
    phases: tuple[str, ...] = (PREFILL, DECODE)


RUNTIMES = (Runtime("onnxruntime", ("F32", "int4_sym")), Runtime("llama.cpp", ("F16", "Q4_0")), Runtime("transformers", ("F32",)))


def networks(shape: Shape) -> dict[str, list[tuple[int, int]]]:
    """What is predicted, by what is said of it: groups and width in each block."""
    rng = random.Random(0)
    found = {f"{groups} groups, {width} wide": [(groups, width)] * shape.blocks for groups, width in UNIFORM}
    for number in range(NUM_MIXED):
        drawn = [(rng.choice(sizes(shape, ATTENTION)), rng.choice(sizes(shape, FEED_FORWARD))) for _ in range(shape.blocks)]
        found[f"a mix of sizes ({number + 1})"] = drawn
    return {**found, "parts left out": list(LEFT_OUT)}


def rows(stopwatch: Stopwatch, runtime: Runtime, setting: Setting) -> list[Row]:
    """One table's predictions, and what was found."""
    config, made = Checkpoint.open(MODEL).config, list[Row]()
    table = measure(stopwatch, config, runtime.target, setting, formats=runtime.formats, threads=1, progress=to_stderr())
    shape = shape_of(config)
    for name in runtime.formats:
        made.append(Row((name, "uncut", f"{table.whole[name]:.3f}", "", "", "")))
        subjects = networks(shape)
        with pinned(1), tempfile.TemporaryDirectory() as folder:
            runs = []
            for blocks in COPIES * [shape.uncut, *subjects.values()]:
                place = Path(folder, str(len(runs)))
                place.mkdir()
                runs.append(stopwatch.ready(sized(config, blocks), name, setting, 1, place))
            shares = [1.0, *Clock(runs[0], 1).shares(runs[1:])]
        whole, *others = (median(shares[index :: len(subjects) + 1]) for index in range(len(subjects) + 1))
        for (about, blocks), share in zip(subjects.items(), others, strict=True):
            predicted, found = table.predict(name, blocks), share / whole * table.whole[name]
            off = predicted / found - 1
            cells = (name, about, f"{predicted:.3f}", f"{table.bound(name, blocks):.3f}", f"{found:.3f}", f"{off:+.1%}")
            made.append(Row(cells, holds=abs(off) <= MOST_OFF))
    return made


def sections(runtime: Runtime, sequence: int) -> Iterator[Section]:
    """One for each phase; none where the runtime isn't installed."""
    try:
        stopwatch = targets.get(runtime.target).stopwatch()
    except RuntimeMissingError as error:
        print(f"{runtime.target} is left out: {error.problem}", file=sys.stderr)
        return
    assert stopwatch is not None, runtime.target
    columns = ("format", "network", "predicted ms", "counts as ms", "found ms", "off by")
    for phase in runtime.phases:
        setting = Setting(1, sequence, phase)
        yield Section(f"{stopwatch.runtime}: {setting}", columns, rows(stopwatch, runtime, setting))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="of the runtimes only this one")
    parser.add_argument("--sequence", type=int, default=128)
    given = parser.parse_args()
    remarks = (
        f"One thread. Medians, of {COPIES} copies of each network; what was found is a share of the uncut network's time, run in turns. A "
        f"row holds where it differs from what was predicted by at most {MOST_OFF:.0%}. Counts as: in a budget, where smaller modules "
        "count for more, by the largest error of a mixed network.",
    )
    found, status = list[Section](), 1
    for runtime in RUNTIMES:
        for section in sections(runtime, given.sequence) if given.target in (None, runtime.target) else ():
            found.append(section)  # the page is there as far as it goes
            title, command = "Latency of a smaller network, predicted", "make bench-latency"
            status = finish_page("latency", title, command, found, remarks, partly=given.target is not None)
    return status


if __name__ == "__main__":
    sys.exit(main())
