"""Sensitivities: their contract, and whether what they predict is what happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from anyfit.api import prepare
from anyfit.family.store import Store
from anyfit.pipeline import Fit
from anyfit.progress import Silent
from anyfit.scores import sensitivities
from anyfit.scores.base import probe
from anyfit.scores.fisher import Fisher
from anyfit.scores.kl import MeasuredKL, _interpolated, num_probes
from anyfit.scores.table import Table
from anyfit.tasks.language import Reference, kl
from anyfit.testing.models import save_tiny, tiny_text
from anyfit.testing.scores import check_sensitivity

Encoded = tuple[Fit, Store]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def encoded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    folder = tmp_path_factory.mktemp("scores")
    (folder / "notes.txt").write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)))
    model = save_tiny(folder / "model", request.param, tie_word_embeddings=True)
    fit = prepare(model, data=folder / "notes.txt", formats=("Q8_0", "Q4_K", "Q2_K"), length=32, segments=8)
    store = Store(folder)
    fit.encode(store)
    return fit, store


@pytest.mark.parametrize("name", sensitivities)
def test_conformance(name: str, encoded: Encoded) -> None:
    fit, store = encoded
    check_sensitivity(sensitivities.get(name), fit.elastic(store), fit.segments.search, fit.errors(store))


@pytest.mark.parametrize("name", sensitivities)
def test_prediction_ranks_units_as_measured(name: str, encoded: Encoded) -> None:
    """One unit at two bits, the rest as it was: predicted against measured."""
    fit, store = encoded
    errors, elastic, tokens = fit.errors(store), fit.elastic(store), fit.segments.search
    table = Table(sensitivities.get(name).measure(elastic, tokens, errors, Silent()), errors)
    reference = Reference.of(fit.model, tokens)
    predicted, measured = [], []
    for decision in fit.space.decisions:
        predicted.append(table.score(decision.unit.name, "Q2_K"))
        measured.append(kl(elastic.stream.predictions(tokens, elastic.disturbed(decision, "Q2_K")), reference))
    assert spearmanr(predicted, measured).statistic > 0.8
    assert 0.2 < np.sum(predicted) / np.sum(measured) < 5


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    folder = tmp_path_factory.mktemp("deep")
    (folder / "notes.txt").write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)))
    model = save_tiny(folder / "model", "llama", num_hidden_layers=9)
    fit = prepare(model, data=folder / "notes.txt", formats=("Q4_K", "Q2_K"), length=32, segments=8)
    store = Store(folder)
    fit.encode(store)
    return fit, store


def test_only_some_blocks_are_probed(deep: Encoded) -> None:
    """Units of the others are near to what their own probes would have said, nearer than by gradients alone."""
    fit, store = deep
    errors, elastic, tokens = fit.errors(store), fit.elastic(store), fit.segments.search
    some, every, fisher = (score.measure(elastic, tokens, errors, Silent()) for score in (MeasuredKL(3), MeasuredKL(None), Fisher()))
    assert some.keys() == every.keys()
    same = {name for name in every if some[name] == every[name]}
    blocks = {name: decision.unit.weights[0].block for decision in fit.space.decisions for name in [decision.unit.name]}
    assert {blocks[name] for name in same} == {None, 0, 4, 8}
    apart = {
        which: np.mean([abs(np.log(found[name] / every[name])) for name in every if name not in same])
        for which, found in (("some", some), ("fisher", fisher))
    }
    assert apart["some"] < 0.7 * apart["fisher"]
    assert num_probes(fit.space.decisions) == sum(1 for block in blocks.values() if block in (None, 0, 3, 5, 8))


def test_units_whose_gradient_is_not_seen_have_what_their_neighbours_have(deep: Encoded) -> None:
    """A network may use a matrix without calling its module."""
    decisions = [d for d in deep[0].space.decisions if d.unit.weights[0].role == "down"]
    names = [d.unit.name for d in decisions]
    measured = {names[0]: 0.4, names[4]: 0.2, names[8]: 0.1}
    found = _interpolated(decisions, measured, dict.fromkeys(names, 0.0))
    assert found[names[2]] == pytest.approx(0.3) and found[names[6]] == pytest.approx(0.15)


def test_probe_is_the_median_choice_that_changes_anything() -> None:
    assert probe({"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0}) == "c"
    assert probe({"a": 0.0}) == "a"


def test_table_survives_its_file(tmp_path: Path) -> None:
    table = Table({"u": 0.1 + 0.2}, {"u": {"Q4_K": 1 / 3}})
    table.save(tmp_path / "table.json")
    assert Table.load(tmp_path / "table.json") == table
