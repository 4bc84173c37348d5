"""Scores of single structures against what leaving each one out really costs: a section of benchmarks/structure.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy.stats import spearmanr
from table import Row, Section
from torch import Tensor

from anyfit.core.config import HEADS, WIDTH
from anyfit.importance import importances
from anyfit.importance.base import NetworkImportance
from anyfit.importance.magnitude import squares
from anyfit.importance.trajectory import num_together
from anyfit.pipeline import Fit
from anyfit.progress import to_stderr
from anyfit.structure.levels import Structure
from anyfit.tasks.language import Quality

NUM_DRAWN, NUM_SEGMENTS = 100, 8
"""Structures, and segments of the search split that each is measured on."""
LOWEST = 0.6
"""Rank correlation."""
CLAIMED, RIVAL = "trajectory", "magnitude"


def singles(run: Fit, quality: Quality, without: Callable[[Mapping[str, Tensor]], Quality]) -> Section:
    """Of a language model: `quality`, as it is, and `without`, as it is with other matrices, by name."""
    together, scores, rows = num_together(run.structures), _scores(run), []
    for axis, each, noun in ((WIDTH, together, "channels"), (HEADS, 1, "groups of heads")):
        drawn = _drawn({name: structure.num // each for name, structure in run.structures.items() if structure.axis == axis})
        costs = [without({name: _zeroed(run, run.structures[name], index, each)}) for name, index in drawn]
        measured = {"KL": [cost.kl_mean for cost in costs], "loss": [math.log(cost.perplexity / quality.perplexity) for cost in costs]}
        found = {}
        for importance, own in scores.items():
            known = [float(own[name][index * each : (index + 1) * each].sum()) for name, index in drawn]
            found[importance] = {what: float(spearmanr(known, values).statistic) for what, values in measured.items()}
        for importance, correlations in found.items():
            holds = correlations["KL"] >= LOWEST and correlations["KL"] > found[RIVAL]["KL"] if importance == CLAIMED else None
            rows.append(Row((noun, str(len(drawn)), importance, *(f"{value:.3f}" for value in correlations.values())), holds))
    remark = (
        f"Structures of the embedded default, drawn at random over all blocks, {together} channel{'s' * (together > 1)} at a time; each is "
        f"zeroed by itself, and the network measured on {NUM_SEGMENTS} segments of the search split, which no score has seen. Rank "
        "correlations (Spearman) of the scores with the KL divergence from the whole network, and with what the loss rises by. "
        f"{CLAIMED} holds from {LOWEST:g} and above {RIVAL}, by the divergence."
    )
    return Section("Scores of single structures", ("structures", "number", "score", "with KL", "with loss"), rows, [remark])


def _scores(run: Fit) -> dict[str, Mapping[str, Tensor]]:
    """By importance and matrix, comparable over the network."""
    found: dict[str, Mapping[str, Tensor]] = {}
    for name in (CLAIMED, "taylor"):
        part = importances.get(name)
        assert isinstance(part, NetworkImportance)
        found[name] = part.scores(run.model, run.architecture, run.structures, run.segments.calibration, to_stderr())
    found[RIVAL] = {name: squares(run.model.get_parameter(name).detach(), structure.size) for name, structure in run.structures.items()}
    return found


def _drawn(numbers: Mapping[str, int]) -> list[tuple[str, int]]:
    """Matrices and places in them, of so many each."""
    every = [(name, index) for name, number in numbers.items() for index in range(number)]
    return [every[place] for place in np.random.default_rng(0).permutation(len(every))[:NUM_DRAWN].tolist()]


def _zeroed(run: Fit, structure: Structure, index: int, each: int) -> Tensor:
    """The matrix that reads it without the structures from `index` times `each` on."""
    matrix = run.model.get_parameter(structure.reader.name).detach().clone()
    size = each * structure.size
    matrix[:, index * size : (index + 1) * size] = 0
    return matrix
