"""Measuring what a network takes on this device, and reading such tables back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from anyfit.architectures import architecture_of
from anyfit.checkpoint import Checkpoint
from anyfit.core.errors import UserError
from anyfit.costs import stopwatch
from anyfit.costs.latency import PREFILL, Device, LatencyTable, Setting
from anyfit.costs.stopwatch import Stopwatch
from anyfit.progress import Progress
from anyfit.targets import targets
from anyfit.targets.base import CutTarget
from anyfit.zoo import MODEL


def measure(
    model: str | Path | None = None,
    *,
    target: str = "onnxruntime",
    batch: int = 1,
    sequence: int = 128,
    phase: str = PREFILL,
    formats: Iterable[str] | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LatencyTable:
    """Time a network and its modules, at every size that a search may choose, in a target's runtime on this device.

    Only the sizes matter, so no matrix is read. `formats`: by default the one of which a pruned network is where nothing is
    quantised. `threads`: by default one for each core that this process may use. `phase`: "prefill", or "decode" where the
    runtime keeps a cache. Raises `UserError` for what can't be timed.
    """
    checkpoint = Checkpoint.open(MODEL if model is None else model, trust_remote_code=trust_remote_code)
    watch = _stopwatch(target)
    return stopwatch.measure(
        watch,
        checkpoint.config,
        target,
        Setting(batch, sequence, phase),
        formats=formats or [_dense(checkpoint, target)],
        threads=threads,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def latencies(path: str | Path) -> LatencyTable:
    """A table that `measure` made. Raises `UserError` where it is another device's, or another version's of its runtime."""
    table = LatencyTable.read(Path(path))
    table.require(Device.here(_stopwatch(table.target).runtime, table.device.threads))
    return table


def _dense(checkpoint: Checkpoint, target: str) -> str:
    skeleton = checkpoint.skeleton()
    return CutTarget.of(targets.get(target)).dense(checkpoint.source(architecture_of(skeleton).weights(skeleton)))


def _stopwatch(target: str) -> Stopwatch:
    found = targets.get(target).stopwatch()
    if found is None:
        raise UserError(f"This version has no stopwatch for {target}.", remedy="Choose another target, such as onnxruntime.")
    return found
