"""What is known of one model in the comparison: its bytes, how it predicts, what it cost. Kept between runs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import anyfit
from anyfit.core.files import read_json, write_json
from anyfit.tasks.language import Quality, Reference, measure


@dataclass(frozen=True)
class Result:
    """One model. `bytes_`: all that is stored of it. `bits`: its tensors' bits over all parameters.

    `losses`: the mean loss of each report segment in nats, so that two models are compared segment by segment.
    `seconds`: CPU time of making it. `detail`: what it is made of, in words.
    """

    peer: str
    setting: str
    bytes_: int
    bits: float
    quality: Quality
    losses: tuple[float, ...]
    seconds: float
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "quality": self.quality.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        return cls(**{**data, "quality": Quality.from_json(data["quality"]), "losses": tuple(data["losses"])})


@dataclass(frozen=True)
class Refused:
    """A peer that made no model: why not, in its own words."""

    peer: str
    setting: str
    reason: str


Outcome = Result | Refused
NOT_RUN = "not run"


def evaluate(model: PreTrainedModel, reference: Reference) -> tuple[Quality, tuple[float, ...]]:
    """Quality on the reference's text, and each segment's mean loss, from the same pass."""
    losses: list[float] = []

    def logits(tokens: Tensor) -> Tensor:
        predicted = model(input_ids=tokens, use_cache=False).logits
        each = torch.nn.functional.cross_entropy(predicted[:, :-1].transpose(1, 2).float(), tokens[:, 1:], reduction="none")
        losses.extend(each.mean(1).tolist())
        return predicted

    return measure(logits, reference), tuple(losses)


class Keep(Enum):
    """What to do about outcomes of earlier runs: take those that there are, make all anew, or take nothing else."""

    REUSE = "reuse"
    FRESH = "fresh"
    ONLY = "only"


def kept(path: Path, key: dict[str, Any], make: Callable[[], Outcome], *, keep: Keep) -> Outcome | None:
    """The outcome at `path` if it was made from the same `key`, otherwise a new one, which is kept there; or None."""
    found = None if keep is Keep.FRESH else read_json(path)
    if found is not None and found["key"] == key:
        return Refused(**found["refused"]) if "refused" in found else Result.from_json(found["result"])
    if keep is Keep.ONLY:
        return None
    outcome = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, **({"refused": asdict(outcome)} if isinstance(outcome, Refused) else {"result": outcome.to_json()})})
    return outcome


def perplexity_rise(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
    """How much higher our perplexity is, as a share of theirs, and its standard error over segments, paired, from segments' losses."""
    differences = np.subtract(ours, theirs)
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return math.expm1(differences.mean()), float(error)


def kl_cell(result: Result) -> str:
    """Mean KL and its standard error, as tables have it."""
    return f"{result.quality.kl_mean:.5f} ± {result.quality.kl_stderr:.5f}"


@cache
def our_code() -> str:
    """A hash of all our source files."""
    found = hashlib.sha256()
    for path in sorted(Path(anyfit.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]
