"""What is kept of an encoder once it is fast: embeddings, and what can be told from them, against uniform pruning and a peer; and with
inputs of matrices rounded to 8 bits against without."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peers.presets import BENCHMARKS
from pruned import NEARBY, RECIPE, THREADS, Subject, families, side_by_side, within
from safetensors.torch import load_file
from table import Row, Section
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anyfit import Family, fit, recovery
from anyfit.architectures import architecture_of
from anyfit.core.config import Config
from anyfit.costs.latency import ATTENTION, FEED_FORWARD, Device, LatencyTable
from anyfit.family.store import Store
from anyfit.interface import interface_of
from anyfit.progress import to_stderr
from anyfit.recipes import recipes
from anyfit.recipes.base import Recovery
from anyfit.structure.cutting import Kept, cut, sizes
from anyfit.targets import onnxruntime_session, targets
from anyfit.targets.base import Cut, CutTarget
from anyfit.targets.onnx_file import ROUNDED
from anyfit.tasks import task_of
from anyfit.tasks.base import Outputs
from anyfit.tasks.embedding import embedded

FASTER = (1.5, 2.0)
CERTAIN = 2
"""Standard errors, from which on a difference of two accuracies counts."""
PEER = "torchpruning"
RATIOS = tuple(round(0.02 * step, 2) for step in range(13, 32))
SCOPES = {"layer": "each layer", "network": "of all"}
"""What its ratio is of."""
NUM_TRAIN, NUM_DEV, DECAY = 12000, 6700, 1e-3
STEPS = 100
"""Of distillation."""
INTEGERS = {
    "F32": "float32",
    "int8_sym": "int8 in groups of 32, inputs rounded block by block (MatMulNBits, accuracy_level 4)",
    "int8_dynamic": "int8, inputs on a grid found anew each time",
    "int8_static": "int8, inputs on a stored grid",
}
TOGETHER, TOKENS = (1, 32), 128


@dataclass(frozen=True)
class Pruned:
    """One pruned network. `ms`: as measured, in turns with the others of its speed-up; `faster`: than the whole network."""

    name: str
    model: PreTrainedModel
    ms: float
    faster: float


Pair = tuple[Pruned, Pruned]
"""anyfit's, and another that takes no less time."""


@dataclass(frozen=True)
class Probe:
    """SST-2 by a linear classifier of embeddings: sentences and labels, for training and for what is reported."""

    tokenizer: PreTrainedTokenizerBase
    train: Sequence[tuple[str, int]]
    dev: Sequence[tuple[str, int]]

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Probe:
        """Drawn from ALPS's split of the official training set."""
        found = []
        for name, number in (("train", NUM_TRAIN), ("dev", NUM_DEV)):
            lines = (folder / f"sst2-{name}.tsv").read_text(encoding="utf-8").splitlines()[1:]
            rows = [(sentence.strip(), int(label)) for sentence, _, label in (line.rpartition("\t") for line in lines)]
            found.append([rows[index] for index in np.random.default_rng(0).permutation(len(rows))[:number].tolist()])
        return cls(tokenizer, *found)

    def right(self, model: PreTrainedModel) -> Tensor:
        """Logistic regression on what this model makes of the training sentences: whether it is right, for each of the others."""
        inputs, labels = (
            torch.cat(parts)
            for parts in zip(*((self._embedded(model, rows), _labels(rows)) for rows in (self.train, self.dev)), strict=True)
        )
        train = slice(0, len(self.train))
        mean, std = inputs[train].mean(0), inputs[train].std(0).clamp_min(1e-6)
        inputs = torch.cat([(inputs - mean) / std, torch.ones(len(inputs), 1)], 1)
        weights = torch.zeros(inputs.shape[1], 2, requires_grad=True)
        solver = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            value = cross_entropy(inputs[train] @ weights, labels[train]) + DECAY * weights.square().sum()
            value.backward()
            return value

        solver.step(loss)
        return (inputs[len(self.train) :] @ weights).argmax(1) == labels[len(self.train) :]

    def _embedded(self, model: PreTrainedModel, rows: Sequence[tuple[str, int]]) -> Tensor:
        """Those of one length together, so that little is padded."""
        ids = [self.tokenizer(sentence)["input_ids"] for sentence, _ in rows]
        order, found = sorted(range(len(ids)), key=lambda index: len(ids[index])), {}
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            longest = len(ids[part[-1]])
            segments = torch.tensor([ids[index] + [-1] * (longest - len(ids[index])) for index in part])
            found |= dict(zip(part, embedded(model, segments), strict=True))
        return torch.stack([found[index] for index in range(len(ids))])


def _better(one: Tensor, other: Tensor) -> bool:
    """Whether one is right more often than the other, beyond chance, on the same sentences."""
    differences = one.float() - other.float()
    return float(differences.mean()) > CERTAIN * float(differences.std()) / len(differences) ** 0.5


def _labels(rows: Sequence[tuple[str, int]]) -> Tensor:
    return torch.tensor([label for _, label in rows])


@dataclass
class Contest:
    """A pruned encoder, and whoever else makes it fast: each speed-up's networks, within the same time by the table."""

    subject: Subject
    assets: Path
    environments: Path | None

    def __post_init__(self) -> None:
        self.setting = self.subject.settings[0]
        self.family, self.table, self._folder = families(self.subject, *self.setting)
        self.original, self.text = self.family.extract(self.family.space.largest()), self.family.text()
        self.reference = task_of(self.family.source.config).reference(self.original, self.text["report"])
        self.probe = Probe.read(self.assets / "nlp-eval", self.family.source.tokenizer())
        peers = _peers(self.subject, self.environments, self._folder / PEER, self.table) if self.environments else {}
        self.pairs = {faster: self._pairs(faster, peers) for faster in FASTER}

    def cosine(self, model: PreTrainedModel) -> float:
        return 1 - self.reference.loss(model)

    def _pairs(self, faster: float, peers: Mapping[Path, float]) -> list[Pair]:
        """Each of the others with anyfit's: the largest that is found nearby and measured to take no longer."""
        budget = self.family.space.costs(self.family.space.largest())["ms"] / faster
        others = _others(self.family, budget, peers)
        configs = list(dict.fromkeys(self.family.select(f"ms <= {share * budget:.6f}").config for share in NEARBY))
        own = [self.family.extract(config) for config in configs]
        whole, *taken = self._taken([self.original, *others.values(), *own])
        theirs, ours = taken[: len(others)], taken[len(others) :]
        found = [Pruned("anyfit", model, ms, whole / ms) for model, ms in zip(own, ours, strict=True)]
        rivals = [Pruned(name, model, ms, whole / ms) for (name, model), ms in zip(others.items(), theirs, strict=True)]
        return [(found[within(rival.ms, ours)], rival) for rival in rivals]

    def _taken(self, models: Sequence[PreTrainedModel]) -> list[float]:
        """Milliseconds, in turns."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            places = [Path(folder, str(number)) for number in range(len(models))]
            for place, model in zip(places, models, strict=True):
                _written(self.family, model, place)
            return side_by_side(self.family, places, *self.setting)

    def rows(self, faster: float, models: Mapping[Pruned, PreTrainedModel], more: Mapping[Pruned, tuple[str, ...]]) -> list[Row]:
        """Of a speed-up's pairs, as these `models` of theirs are; `more`: what else is shown of each."""
        kept = {pruned: (self.cosine(model), self.probe.right(model)) for pruned, model in models.items()}
        rows = []
        for own, other in self.pairs[faster]:
            holds = own.ms <= other.ms and kept[own][0] >= kept[other][0] and not _better(kept[other][1], kept[own][1])
            for pruned in (own, other):
                cosine, right = kept[pruned]
                speed = f"{pruned.ms:.2f} ({pruned.faster:.2f}x)"
                cells = (f"{faster:g}x", pruned.name, speed, *more[pruned], f"{cosine:.4f}", f"{right.float().mean():.1%}")
                rows.append(Row(cells, holds if pruned is own else None))
        return rows

    def networks(self, faster: float) -> list[Pruned]:
        return list(dict.fromkeys(pruned for pair in self.pairs[faster] for pruned in pair))

    @property
    def remarks(self) -> list[str]:
        batch, tokens = self.setting
        return [
            f"{self.subject.name} in {self.table.device.runtime}, {THREADS} thread, batch {batch}, {tokens} tokens. Cosine: mean agreement "
            f"of embeddings with the original's on {len(self.text['report'])} held-out sentences. SST-2: a logistic regression on "
            f"embeddings of {NUM_TRAIN} sentences, right on {NUM_DEV} others (standard error {100 * 0.4 / NUM_DEV**0.5:.1f} points).",
            "In pairs at equal measured time: each of the others, and anyfit's before it, the largest within "
            f"{NEARBY[0]:.0%} to {NEARBY[-1]:.0%} of that time that takes no longer, all measured in turns, as two copies. Its row "
            f"holds where it takes no longer, its cosine is no lower, and the other isn't right more often by {CERTAIN} standard errors, "
            "of the difference on the same sentences.",
            *([] if self.environments else ["Torch-Pruning wasn't run: its environment wasn't named."]),
        ]


def retained(contest: Contest) -> Section:
    """At each speed-up: the searched network, the best uniform one and the peer's best, all within the same time by the table."""
    rows = [Row(("", "the original", "", "1", f"{contest.probe.right(contest.original).float().mean():.1%}"))]
    for faster in FASTER:
        networks = contest.networks(faster)
        rows += contest.rows(faster, {pruned: pruned.model for pruned in networks}, dict.fromkeys(networks, ()))
    about = (
        "One shot: nothing is trained. Uniform: the best of this family's settings that keep the same share everywhere, repaired by the "
        "same least squares. Torch-Pruning: heads and channels by its group magnitude, with one ratio for each layer or one threshold for "
        "all, whichever is closer; the width of the network stays, as embeddings of another size couldn't be compared. Each of these is "
        "the largest within the time by the table that was asked for."
    )
    return Section("What is kept at equal time", ("asked for", "", "ms", "cosine", "SST-2"), rows, [*contest.remarks, about])


def distilled(contest: Contest) -> Section:
    """The networks of `retained`, each trained in the same way."""
    found = recipes.get(RECIPE).recovery
    assert found is not None
    settings = replace(found.settings, num_steps=STEPS)
    how, text, rows = replace(found, settings=settings), contest.text["calibration"], list[Row]()
    for faster in FASTER:
        models, more = dict[Pruned, PreTrainedModel](), dict[Pruned, tuple[str, ...]]()
        for pruned in contest.networks(faster):
            before, began = contest.cosine(pruned.model), time.process_time()
            models[pruned] = _trained(contest, pruned, how, text)
            more[pruned] = f"{time.process_time() - began:.0f}", f"{before:.4f}"
        rows += contest.rows(faster, models, more)
    about = (
        f"The networks that are compared in one shot: all numbers of each trained for {STEPS} steps of {settings.batch_size} sentences, "
        f"Adam at {found.encoders * settings.rate:g} falling to zero, towards the states of the original's tokens after every block "
        f"(`anyfit.recovery`, what `anyfit refine` does in {found.settings.num_steps} steps), on the same {len(text)} calibration "
        "sentences in the same order. Seconds are the processor's, of one core."
    )
    header = ("asked for", "", "ms", "seconds", "cosine before", "cosine", "SST-2")
    return Section("After distillation", header, rows, [*contest.remarks, about])


def _trained(contest: Contest, pruned: Pruned, how: Recovery, text: Tensor) -> PreTrainedModel:
    model = copy.deepcopy(pruned.model)
    with tempfile.TemporaryDirectory() as folder:
        # Whoever made it, it is one network, which runs in one way: no config says more of it.
        recovery.Recovery(contest.original, text, how, how.settings, to_stderr()).run(
            model, Config({}), 32.0, store=Store(Path(folder)), checkpoint="checkpoint.safetensors"
        )
    return model.requires_grad_(False)


def integers(subject: Subject, work: Path) -> Section:
    """One format everywhere, one text at a time and many: how long a text takes, and how far its embedding is off in ONNX Runtime."""
    family = fit(subject.model, output=work / "int8.family", target="onnxruntime", formats=list(INTEGERS), **subject.wishes)
    text, rows = family.text()["report"], []
    reference = task_of(family.source.config).reference(family.extract("F32"), text)
    made = {name: family.export(name, work / name) for name in INTEGERS}
    for batch in TOGETHER:
        taken = dict(zip(INTEGERS, side_by_side(family, [export.path for export in made.values()], batch, TOKENS), strict=True))
        for name, about in INTEGERS.items():
            loss = reference.loss(_in_batches(family, made[name].path, batch))
            cells = (
                f"{batch}",
                about,
                f"{made[name].bytes_ / 1e6:.1f} MB",
                f"{taken[name]:.2f} ({taken['F32'] / taken[name]:.2f}x)",
                f"{loss:.2g}",
            )
            rows.append(Row(cells, taken[name] < taken["int8_sym"] if name in ROUNDED else None))
    processor = Device.here("", THREADS).processor
    remarks = [
        f"{subject.name} in ONNX Runtime {version('onnxruntime')}, {THREADS} thread, {TOKENS} tokens; {processor}. The table of words is "
        "int8 in groups of 32 in all but float32. Distance: of embeddings from the original's, as ONNX Runtime makes them of "
        f"{len(text)} held-out sentences, so many together (padded to the longest). Rows hold where they take less time than groups do.",
    ]
    return Section("Inputs rounded to 8 bits", ("texts", "matrices", "size", "ms", "1 - cosine"), rows, remarks)


def _in_batches(family: Family, path: Path, batch: int) -> Outputs:
    """What ONNX Runtime computes for texts, so many at once, whoever asks for how many."""
    interface = interface_of(family.source.config)
    session = onnxruntime_session.opened(path, threads=THREADS)

    def run(segments: Tensor) -> Tensor:
        parts = (onnxruntime_session.feed(session, interface, part) for part in segments.split(batch))
        return torch.cat([torch.from_numpy(session.run([interface.output], part)[0]) for part in parts])

    return run


def _others(family: Family, budget: float, peers: Mapping[Path, float]) -> dict[str, PreTrainedModel]:
    """The best uniform network that takes so many milliseconds by the table; of the peer's the closest to the original."""
    uniform = min((p for p in family.points if p.uniform and family.size(p) <= budget), key=lambda p: p.search.loss)
    largest = family.extract(family.space.largest())
    reference = task_of(family.source.config).reference(largest, family.text()["search"])
    found = {}
    for scope, about in SCOPES.items():
        possible = {path: ms for path, ms in peers.items() if ms <= budget and path.name.startswith(scope)}
        if possible:
            path = max(possible, key=lambda path: possible[path])
            model = cut_as(family.extract(family.space.largest()), load_file(path))
            found[f"Torch-Pruning ({path.stem.partition('-')[2]}, {about})"] = model
    closest = sorted(found.items(), key=lambda entry: reference.loss(entry[1]))[:1]
    return {f"uniform ({uniform.uniform})": family.extract(uniform.config), **dict(closest)}


def _written(family: Family, model: PreTrainedModel, path: Path) -> None:
    def nothing(*_: object) -> Tensor:
        raise AssertionError("all of it is in float32")

    CutTarget.of(targets.get(family.target)).write_cut(path, family.source, Cut(model, {}, nothing))


def _peers(subject: Subject, environments: Path, out: Path, table: LatencyTable) -> dict[Path, float]:
    """Everything that the peer's program makes of the network, in its own environment, with the milliseconds that each should take."""
    python, checkpoint = (environments / PEER / "bin" / "python").absolute(), subject.checkpoint()
    out.mkdir()
    options = ["--model", str(checkpoint.folder.absolute()), "--out", str(out), "--ratios", json.dumps(RATIOS)]
    variables = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([str(python), "-m", f"peers.{PEER}", *options], check=True, cwd=out, env=variables)
    return {path: _counted(cut_as(checkpoint.load(), load_file(path)), table) for path in sorted(out.glob("*.safetensors"))}


def cut_as(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """The network with these tensors, cut to what they leave of its blocks."""
    architecture, kept = architecture_of(model), []
    for index, own in enumerate(sizes(model, architecture)):
        block = architecture.block.format(i=index)
        paths = {role: f"{block}.{path}.weight" for _, group in architecture.groups(index) for role, path in group.items()}
        groups, channels = len(tensors[paths["q"]]) // (own.heads * own.head_dim), len(tensors[paths["up"]])
        kept.append(Kept(torch.arange(groups), torch.arange(channels)))
    cut(model, architecture, kept)
    model.load_state_dict(dict(tensors))
    return model


def _counted(model: PreTrainedModel, table: LatencyTable) -> float:
    """Milliseconds by the table, as budgets count them, between its sizes in proportion."""
    total = table.rest("F32")
    for own in sizes(model, architecture_of(model)):
        for kind, size in ((ATTENTION, own.groups), (FEED_FORWARD, own.channels)):
            known = table.sizes(kind, "F32")
            total += float(np.interp(size, known, [table.at_most(kind, at, "F32") for at in known]))
    return total
