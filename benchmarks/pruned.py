"""What the sections about pruned networks share: the networks, families of them for a latency as measured now, and their times."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyfit import Family, fit
from anyfit.checkpoint import Checkpoint
from anyfit.core.config import Config
from anyfit.costs.latency import LatencyTable
from anyfit.costs.stopwatch import pinned
from anyfit.family import Point
from anyfit.interface import interface_of
from anyfit.measuring import measure as measure_latency
from anyfit.progress import to_stderr
from anyfit.targets import onnxruntime_session, targets
from anyfit.targets.base import CutTarget
from anyfit.tasks import task_of
from anyfit.tasks.base import Quality
from anyfit.tasks.language import Quality as LanguageQuality

Taken = Mapping[Config, float]
"""Milliseconds."""
Qualities = Mapping[Config, Quality]

RECIPE = "ziplm"
THREADS, COPIES, ROUNDS, SECONDS = 1, 2, 31, 60.0
"""Copies of everything that is timed side by side, which may differ by a percent or two for as long as they live; rounds, and a third of
them where they take longer than this."""
NEARBY = tuple(1 - 0.01 * number for number in range(10))
"""Shares of a time by the table: of what is found within them, whoever is compared takes what is measured to keep to a time."""
WARMING = 2
"""Runs before the one that counts."""
NUM_SENTENCES, LENGTH = 2000, 32
"""Sentences of each kind, and tokens of each at most."""


@dataclass(frozen=True)
class Subject:
    """A network, and what its families are made with. `settings`: (texts, tokens) that are run together."""

    name: str
    settings: tuple[tuple[int, int], ...]
    model: Path | None = None
    wishes: Mapping[str, Any] = field(default_factory=dict)

    def checkpoint(self) -> Checkpoint:
        """Of one that isn't the embedded default."""
        assert self.model is not None
        return Checkpoint.open(self.model)


def default() -> Subject:
    return Subject("The embedded default", ((1, 128), (32, 32)))


def minilm(folder: Path, assets: Path, work: Path) -> Subject:
    """all-MiniLM-L6-v2, and sentences for it: of films' reviews and of an encyclopedia. `work` takes them."""
    reviews = [line.split("\t")[0].strip() for line in _lines(assets / "nlp-eval" / "sst2-train.tsv")[1:]]
    articles = [line for line in _lines(assets / "text" / "wikitext2-valid.txt") if not line.startswith("=")]
    encyclopedia = [part.strip() for line in articles for part in line.split(" . ")]
    rng = random.Random(0)
    drawn = [rng.sample([s for s in kind if len(s.split()) >= 4], NUM_SENTENCES) for kind in (reviews, encyclopedia)]
    path = work / "sentences.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for kind in drawn for text in kind), encoding="utf-8")
    wishes = {"data": path, "length": LENGTH}
    return Subject("all-MiniLM-L6-v2", ((1, 128), (32, 32)), folder, wishes)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


_MADE: dict[tuple[str, int, int, tuple[str, ...] | None], tuple[tempfile.TemporaryDirectory[str], Family, LatencyTable]] = {}


def families(subject: Subject, batch: int, sequence: int, formats: tuple[str, ...] | None = None) -> tuple[Family, LatencyTable, Path]:
    """The network pruned for a latency as measured now, once a process, and an empty folder to write its models to."""
    key = (subject.name, batch, sequence, formats)
    if key not in _MADE:
        place = tempfile.TemporaryDirectory()
        folder = Path(place.name)
        wishes = {"target": "onnxruntime", "formats": formats, "progress": to_stderr()}
        table = measure_latency(subject.model, batch=batch, sequence=sequence, threads=THREADS, **wishes)
        table.write(folder / "latency.json")
        wishes |= {"recipe": RECIPE, "latency": folder / "latency.json", **subject.wishes}
        _MADE[key] = place, fit(subject.model, output=folder / "made.family", **wishes), table
    place, family, table = _MADE[key]
    return family, table, Path(tempfile.mkdtemp(dir=place.name))


def side_by_side(family: Family, folders: Sequence[Path], batch: int, sequence: int) -> list[float]:
    """Milliseconds of each model, all taking turns in another order each round: medians of the shares of a round, times a
    round's median, and means over copies. Not by the clock that tables are made with, as what it says is judged here."""
    config = family.source.config
    interface = interface_of(config)
    segments = interface.example(config, batch, sequence)
    times, number = list[list[float]](), len(folders)
    with pinned(THREADS):
        sessions = [onnxruntime_session.opened(folder, threads=THREADS) for folder in [*folders] * COPIES]
        feeds = [onnxruntime_session.feed(session, interface, segments) for session in sessions]
        began, rng, turns = time.thread_time(), random.Random(0), list(range(len(sessions)))
        while len(times) < (ROUNDS if time.thread_time() - began < SECONDS else ROUNDS // 3):
            rng.shuffle(turns)
            row = dict.fromkeys(turns, 0.0)
            for turn in turns:
                for _ in range(WARMING + 1):  # the last one counts
                    start = time.thread_time()  # of the one thread: other processes' turns don't count
                    sessions[turn].run([interface.output], feeds[turn])
                    row[turn] = 1e3 * (time.thread_time() - start)
            times.append([row[turn] for turn in range(len(sessions))])
    whole = statistics.median(map(sum, times))
    found = [whole * statistics.median(row[turn] / sum(row) for row in times) for turn in range(len(sessions))]
    return [statistics.mean(found[place::number]) for place in range(number)]


def write(family: Family, config: Config, path: Path) -> None:
    """As `Family.export` does, of a config that no budget need lead to."""
    CutTarget.of(targets.get(family.target)).write_cut(path, family.source, family.cut(config))


def timed(family: Family, points: Sequence[Point], folder: Path, batch: int, sequence: int) -> dict[Config, float]:
    """Milliseconds of these models and of the whole network, written to the folder."""
    configs = list(dict.fromkeys([family.space.largest(), *(point.config for point in points)]))
    for number, config in enumerate(configs):
        write(family, config, folder / f"{number}")
    return dict(zip(configs, side_by_side(family, [folder / f"{n}" for n in range(len(configs))], batch, sequence), strict=True))


def within(ms: float, taken: Sequence[float]) -> int:
    """The first place where no more than so many milliseconds were taken; the last one where there is none."""
    return next((place for place, own in enumerate(taken) if own <= ms), len(taken) - 1)


def qualities(family: Family, points: Sequence[Point]) -> dict[Config, Quality]:
    """On the report split, of what is extracted."""
    text = family.text()["report"]
    reference = task_of(family.source.config).reference(family.extract(family.space.largest()), text)
    distinct = {p.config: p for p in points}.values()
    return {p.config: p.report or reference.measured(family.extract(p.config)) for p in distinct}


def named(quality: Quality) -> str:
    """What `shown` shows."""
    return " / ".join([quality.distance, *([quality.own[0]] if quality.own else [])])


def shown(quality: Quality) -> str:
    """The distance from the original, and what the model has by itself."""
    return " / ".join([f"{quality.loss:.4f}", *([quality.own[1]] if quality.own else [])])


def harm(quality: Quality, original: Quality) -> float:
    """What was lost: perplexity won, or the distance of embeddings."""
    if isinstance(quality, LanguageQuality) and isinstance(original, LanguageQuality):
        return quality.perplexity - original.perplexity
    return quality.loss
