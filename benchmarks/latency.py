"""Whether the latency of a smaller network is what a table of its modules' latencies predicts.

The embedded default, uniformly cut and with other sizes in each block, one thread. Predicted from the table that `anyfit measure`
makes; then each network is built whole and timed in turn with the uncut one.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch
from table import Row, finish
from transformers import PretrainedConfig, PreTrainedModel

from anyfit import network
from anyfit.architectures import architecture_of
from anyfit.checkpoint import Checkpoint
from anyfit.costs.latency import ATTENTION, FEED_FORWARD, Setting
from anyfit.costs.probes import probe, shape_of
from anyfit.costs.stopwatch import Clock, measure, pinned, sizes
from anyfit.progress import to_stderr
from anyfit.structure.cutting import Kept, cut
from anyfit.targets import targets
from anyfit.zoo import MODEL

MOST_OFF = 0.07
UNIFORM = ((2, 256), (1, 512), (1, 128))
NUM_MIXED = 2


def smaller(config: PretrainedConfig, blocks: list[tuple[int, int]]) -> PreTrainedModel:
    """The network with so many groups and such a width in each block."""
    model = network.frame(config, trust_remote_code=False)
    return cut(model, architecture_of(model), [Kept(torch.arange(groups), torch.arange(width)) for groups, width in blocks])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--formats", default="F32,int4_sym")
    parser.add_argument("--sequence", type=int, default=128)
    given = parser.parse_args()
    config, setting = Checkpoint.open(MODEL).config, Setting(1, given.sequence)
    stopwatch = targets.get(given.target).stopwatch()
    assert stopwatch is not None, given.target
    formats = given.formats.split(",")
    table = measure(stopwatch, config, given.target, setting, formats=formats, threads=1, progress=to_stderr())
    shape, rng = shape_of(config), random.Random(0)
    networks = {f"{groups} groups, {width} wide": [(groups, width)] * shape.blocks for groups, width in UNIFORM}
    for number in range(NUM_MIXED):
        drawn = [(rng.choice(sizes(shape, ATTENTION)), rng.choice(sizes(shape, FEED_FORWARD))) for _ in range(shape.blocks)]
        networks[f"a mix of sizes ({number + 1})"] = drawn
    rows = []
    for name in formats:
        with pinned(1), tempfile.TemporaryDirectory() as whole:
            clock = Clock(stopwatch.ready(probe(config, shape), name, setting, 1, Path(whole)), 1)
            rows.append(Row((name, "uncut", f"{table.whole[name]:.2f}", "", "")))
            for about, blocks in networks.items():
                with tempfile.TemporaryDirectory() as folder:
                    share = clock.share(stopwatch.ready(smaller(config, blocks), name, setting, 1, Path(folder)))
                modules = [module for groups, width in blocks for module in ((ATTENTION, groups), (FEED_FORWARD, width))]
                predicted, found = table.predict(name, modules), share * table.whole[name]
                off = predicted / found - 1
                cells = (name, about, f"{predicted:.2f}", f"{found:.2f}", f"{off:+.1%}")
                rows.append(Row(cells, holds=abs(off) <= MOST_OFF))
    remarks = (
        f"{setting.phase} of {setting.batch} x {setting.sequence} tokens in {table.device.runtime}, one thread of "
        f"{table.device.processor}. Medians; what was found is a share of the uncut network's time, run in turns. A row holds where "
        f"the two differ by at most {MOST_OFF:.0%}.",
    )
    columns = ("format", "network", "predicted ms", "found ms", "off by")
    return finish("latency", "Latency of a smaller network, predicted", "make bench-latency", columns, rows, remarks)


if __name__ == "__main__":
    sys.exit(main())
