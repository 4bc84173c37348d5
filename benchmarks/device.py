"""A graphics processor against this machine's processors: the same results, in less time, in the memory that was planned.

python benchmarks/device.py [--only SECTION]

Needs a graphics processor that torch can use. Both sides run on one machine, one after the other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from synthetic import Shape, write
from table import Row, Section, finish_page

import anyfit
from anyfit import api, devices, estimates
from anyfit.elastic.linear import ElasticNetwork
from anyfit.family.store import Store, stored_matrices
from anyfit.formats import formats
from anyfit.progress import Silent
from anyfit.tasks.language import Reference
from anyfit.testing.devices import rounding_case
from anyfit.testing.models import tiny_text
from anyfit.trainers import samplers
from anyfit.trainers.decoupled import Decoupled
from anyfit.trainers.loop import Settings, train
from anyfit.trainers.losses import Divergence
from anyfit.training import stored_choices, trained

LARGE = Shape(2048, 4, vocabulary=8192)
FIVE = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K")
LENGTH, SEGMENTS = 64, 32
SCALAR = ("Q8_0", "Q6_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS")
"""What a graphics processor rounds; entries of codebooks are chosen by the processors in any case."""
SAME_FORMAT, SAME_SIZE = 0.02, 0.05
"""Of the divergence: how far the same format, or the best of about the same size, may be from what the processors make of it. Sizes
may hold other mixes."""
PLANNED = 0.20
TRAINED_SHAPE, TRAINED_STEPS, TRAINED_FORMATS = Shape(1024, 8, vocabulary=8192), 30, ("int2_offset", "int3_offset", "int4_offset")


@cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="anyfit-device-"))


@cache
def model(shape: Shape) -> Path:
    return write(shape, folder() / f"{shape.width}-{shape.num_blocks}")


@cache
def text() -> str:
    path = folder() / "text.txt"
    path.write_text("\n\n".join(tiny_text(2000, seed=seed) for seed in range(100)), encoding="utf-8")
    return str(path)


def say(row: Row) -> Row:
    print("  ".join(row.cells), flush=True)
    return row


def kernel_section() -> Section:
    """The same columns rounded by the compiled loops and by the kernel."""
    rows = []
    for name in ("Q2_K", "Q3_K", "Q4_K", "Q8_0", "int3_sym", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ2_0"):
        for columns, num_rows in ((64, 1000), (32, 37)):
            case = rounding_case(formats.get(name), columns, num_rows, seed=columns)
            different = case.different("cuda")
            rows.append(say(Row((name, f"{columns} x {num_rows}", ", ".join(different) or "none"), holds=not different)))
    remark = "Codes, rounded weights, what is passed on and errors; numbers are compared by their bits."
    return Section("The kernel against the compiled loops", ("format", "columns x rows", "what differs"), rows, (remark,))


def kernel_speed_section() -> Section:
    rows = []
    for name in ("Q4_K", "Q2_K", "IQ4_NL"):
        case = rounding_case(formats.get(name), 64, 4096, seed=0)
        seconds = {where: case.seconds(where) for where in ("cpu", "cuda")}
        cells = (name, f"{seconds['cpu'] * 1e3:.2f}", f"{seconds['cuda'] * 1e3:.2f}", f"{seconds['cpu'] / seconds['cuda']:.1f}")
        rows.append(say(Row(cells)))
    remark = "64 columns of 4096 rows, what lies between two products; medians. The loops use all of the processors."
    return Section("Rounding", ("format", "ms, cpu", "ms, cuda", "ratio"), rows, (remark,))


@contextmanager
def fitted(where: str, source: Path | None = None, **wishes: Any) -> Iterator[tuple[anyfit.Family, _Stages]]:
    stages = _Stages(where)
    with tempfile.TemporaryDirectory() as place:
        yield anyfit.fit(source, output=Path(place, "made.family"), device=where, progress=stages, **wishes), stages


class _Stages(Silent):
    """Seconds of each stage, and the most memory of the graphics processor that any of them took."""

    def __init__(self, where: str) -> None:
        self.seconds: dict[str, float] = {}
        self._peak = devices.Peak(devices.device(where))

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Any]:
        began = time.perf_counter()
        with super().stage(name, total) as stage:
            yield stage
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - began
        print(f"{name}: {self.seconds[name]:.1f} s", file=sys.stderr, flush=True)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def peak(self) -> int:
        return self._peak.bytes_


def agreement_section() -> Section:
    """The embedded default at normal effort on both, and once more on the graphics processor."""
    rows, wishes = [], {"formats": SCALAR}
    with fitted("cpu", **wishes) as (theirs, slow), fitted("cuda", **wishes) as (ours, fast), fitted("cuda", **wishes) as (again, _):
        points = {point.uniform: point for point in theirs.points if point.uniform}
        for point in ours.points:
            if point.uniform not in points:
                continue
            other = points[point.uniform]
            rows.append(
                _agreement(f"{point.uniform} everywhere", other.report.kl_mean, point.report.kl_mean, _alike(theirs, ours, point.uniform))
            )
        for share in (0.25, 0.35, 0.5):
            other, own = (_best(family, share) for family in (theirs, ours))
            rows.append(_agreement(f"the best measured within {share:.0%}", other, own, "", SAME_SIZE))
        same = ours.digest == again.digest
        rows.append(say(Row(("made twice on the graphics processor", "", "", "the same bytes" if same else "other bytes", ""), holds=same)))
        seconds = f"{slow.total:.0f} / {fast.total:.0f} s"
    remark = f"A format holds within {SAME_FORMAT:.0%}, a size, which may be another mix, within {SAME_SIZE:.0%}. Stages took {seconds}."
    return Section("The embedded default", ("what", "KL, cpu", "KL, cuda", "codes alike", "difference"), rows, (remark,))


def _best(family: anyfit.Family, share: float) -> float:
    """What the best measured config loses that takes at most a share of the original's bytes."""
    small = (point for point in family.points if point.bytes_ <= share * family.original.bytes_)
    return min(small, key=lambda point: point.search.kl_mean).report.kl_mean


def _agreement(what: str, theirs: float, ours: float, alike: str, most: float = SAME_FORMAT) -> Row:
    difference = ours / theirs - 1 if theirs else 0.0
    return say(Row((what, f"{theirs:.5f}", f"{ours:.5f}", alike, f"{difference:+.2%}"), holds=abs(difference) <= most))


def _alike(one: anyfit.Family, other: anyfit.Family, name: str) -> str:
    """Share of stored bytes that are the same."""
    same = total = 0
    for decision in one.space.decisions:
        if any(choice.name == name for choice in decision.choices):
            for weight in decision.unit.weights:
                parts = [Store(family.path).variant(weight.name, name) for family in (one, other)]
                same += int((parts[0] == parts[1]).sum())
                total += parts[0].numel()
    return f"{same / total:.2%} of bytes" if total else ""


def speed_section() -> Section:
    """A large network in five formats."""
    wishes: dict[str, Any] = {"data": text(), "formats": FIVE, "length": LENGTH, "segments": SEGMENTS, "effort": "low"}
    api.NUM_SEARCH = api.NUM_REPORT = 8
    run = api.prepare(model(LARGE), device="cuda", **wishes)
    needs, parameters = estimates.needs(run), run.space.num_parameters / 1e9
    torch.cuda.empty_cache()
    with fitted("cuda", model(LARGE), **wishes) as (_, fast):
        pass
    peak = fast.peak
    with fitted("cpu", model(LARGE), **wishes) as (_, slow):
        pass
    rows = []
    for name in fast.seconds:
        ratio = slow.seconds[name] / fast.seconds[name]
        rows.append(say(Row((name, f"{slow.seconds[name]:.1f}", f"{fast.seconds[name]:.1f}", f"{ratio:.1f}"))))
    faster = slow.total / fast.total
    rows.append(say(Row(("all", f"{slow.total:.1f}", f"{fast.total:.1f}", f"{faster:.1f}"), holds=faster > 1)))
    planned = needs.device_memory / peak
    cells = (
        "memory of the graphics processor, planned / taken",
        "",
        f"{needs.device_memory / 1e9:.2f} / {peak / 1e9:.2f} GB",
        f"{planned:.2f}",
    )
    rows.append(say(Row(cells, holds=abs(planned - 1) <= PLANNED)))
    cells = ("seconds, planned / taken", "", f"{needs.seconds:.0f} / {fast.total:.0f}", f"{needs.seconds / fast.total:.2f}")
    rows.append(say(Row(cells, holds=1 / 1.5 <= needs.seconds / fast.total <= 1.5)))
    rows.append(say(_refused(wishes)))
    remark = (
        f"A Llama of random weights, {parameters:.2f} billion parameters, in {', '.join(FIVE)}; {SEGMENTS} segments of {LENGTH} tokens. "
        f"Planned memory holds within {PLANNED:.0%}, planned time within a factor of 1.5."
    )
    return Section("A large network", ("stage", "seconds, cpu", "seconds, cuda", "ratio"), rows, (remark,))


def _refused(wishes: dict[str, Any]) -> Row:
    """A limit that isn't enough."""
    try:
        anyfit.fit(model(LARGE), output=folder() / "refused.family", device="cuda", memory="1GB", **wishes)
    except anyfit.UserError as error:
        return Row(("--memory 1GB", "", "refused", error.problem), holds=not (folder() / "refused.family").exists())
    return Row(("--memory 1GB", "", "not refused", ""), holds=False)


@dataclass
class _Trained:
    tokens_a_second: float
    memory: int


def training_section() -> Section:
    """Elastic training against plain LoRA of the same network, same micro-batches, same loss."""
    settings = replace(Settings(), num_steps=TRAINED_STEPS, batch_size=8)
    run = api.prepare(
        model(TRAINED_SHAPE),
        data=text(),
        target="transformers",
        formats=("int8_asym", *TRAINED_FORMATS),
        recipe="llm-qfa",
        length=256,
        segments=64,
        device="cuda",
    )
    with tempfile.TemporaryDirectory() as place:
        store = Store(Path(place))
        run.encode(store)
        space, decisions = run.space, trained(run.space)
        matrices = stored_choices(space, decisions, lambda c: stored_matrices(store.variant, space, c, run.target, run.source))
        reference = Reference.of(run.model, run.segments.calibration, kept_bytes=1 << 33)
        found = {"elastic": _elastic(run, store, matrices, decisions, reference, settings), "LoRA": _lora(run, reference, settings)}
    rows = [say(Row((name, f"{one.tokens_a_second:,.0f}", f"{one.memory / 1e9:.2f} GB"))) for name, one in found.items()]
    parameters = run.space.num_parameters / 1e6
    remark = (
        f"{parameters:.0f}M parameters; {', '.join(TRAINED_FORMATS)} at once against adapters of the same rank, {settings.rank}, beside "
        f"the unquantised network (peft); {settings.batch_size} windows of 256 tokens a step, {settings.micro_batch} at a time, products "
        "in bfloat16."
    )
    return Section("Training", ("what", "tokens a second", "peak memory of the graphics processor"), rows, (remark,))


def _elastic(run: Any, store: Store, matrices: Any, decisions: Any, reference: Reference, settings: Settings) -> _Trained:
    network = ElasticNetwork(run.elastic_model(store).set(run.space.largest()), decisions, matrices, settings.rank, settings.seed)
    sampler = samplers.get("balanced")(decisions, settings.num_steps)

    def steps(number: int) -> None:
        few = replace(settings, num_steps=number)
        train(Decoupled(network, Divergence(network.model, reference)), sampler, few, checkpoint={}, keep=lambda _: None, progress=Silent())

    return _timed(steps, reference, settings)


def _lora(run: Any, reference: Reference, settings: Settings) -> _Trained:
    from peft import LoraConfig, get_peft_model

    network = get_peft_model(
        run.checkpoint.load().to("cuda"), LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules="all-linear")
    )
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)

    def steps(number: int) -> None:
        for step in range(number):
            batch = torch.arange(settings.batch_size) + step * settings.batch_size % (len(reference.tokens) - settings.batch_size)
            optimizer.zero_grad()
            for part in batch.split(settings.micro_batch):
                with torch.autocast("cuda", torch.bfloat16):
                    logits = network(input_ids=reference.tokens[part].cuda(), use_cache=False).logits
                (len(part) / len(batch) * reference.divergence(logits, part)).backward()
            optimizer.step()

    return _timed(steps, reference, settings)


def _timed(steps: Callable[[int], None], reference: Reference, settings: Settings) -> _Trained:
    steps(3)
    torch.cuda.synchronize()
    peak, began = devices.Peak(devices.device("cuda")), time.perf_counter()
    steps(settings.num_steps)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return _Trained(settings.num_steps * settings.batch_size * reference.tokens.shape[1] / seconds, peak.bytes_)


def recipes_section() -> Section:
    """What has the whole network in memory, on the embedded default: training and refining."""
    rows = []
    few: dict[str, Any] = {"formats": ("int8_asym", *TRAINED_FORMATS), "target": "transformers", "recipe": "llm-qfa", "effort": "low"}
    for name, wishes in {"llm-qfa, low effort": few, "gptq, high effort": {"formats": ("Q8_0", "Q4_K", "Q2_K"), "effort": "high"}}.items():
        with fitted("cpu", **wishes) as (theirs, slow), fitted("cuda", **wishes) as (ours, fast):
            smallest = [
                min(family.points, key=lambda point: (point.bytes_, point.report.kl_mean)).report.kl_mean for family in (theirs, ours)
            ]
            difference = smallest[1] / smallest[0] - 1
            cells = (name, *(f"{kl:.5f}" for kl in smallest), f"{difference:+.1%}", f"{slow.total:.0f} / {fast.total:.0f}")
            rows.append(say(Row(cells, holds=abs(difference) <= 0.05)))
    remark = "Divergence of the smallest size. Training and refining follow other paths in other arithmetic: holds within 5 %."
    return Section("Training and refining", ("what", "KL, cpu", "KL, cuda", "difference", "seconds, cpu / cuda"), rows, (remark,))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made = {
        "kernel": kernel_section,
        "rounding": kernel_speed_section,
        "default": agreement_section,
        "large": speed_section,
        "training": training_section,
        "recipes": recipes_section,
    }
    parser.add_argument("--only", default=None, help=f"of {', '.join(made)}; several with commas")
    args = parser.parse_args()
    devices.device("cuda")  # the error says what lacks
    wanted = args.only.split(",") if args.only else list(made)
    where = torch.cuda.get_device_name()
    remark = f"{where}, {torch.get_num_threads()} threads of the machine's processors."
    sections, status = list[Section](), 1
    for name in wanted:
        sections.append(made[name]())
        status = finish_page("device", "On a graphics processor", "make bench-device", sections, (remark,), partly=bool(args.only))
    return status


if __name__ == "__main__":
    sys.exit(main())
