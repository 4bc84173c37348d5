"""What more effort brings: slow formats, evolution, refined finalists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import anyfit
from anyfit import Family, finalists, pipeline
from anyfit.core.effort import Effort
from anyfit.core.errors import UserError
from anyfit.progress import Silent
from anyfit.searchers import evolution
from anyfit.targets import targets
from anyfit.testing.models import save_tiny
from anyfit.tuning.refining import Refinery, windows

SMALL: dict[str, Any] = {"formats": ("BF16", "Q4_0", "Q2_K", "IQ2_XS"), "length": 32, "segments": 16}


@pytest.fixture(scope="module", autouse=True)
def fewer_measurements() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finalists, "NUM_FINALISTS", 4)
        patch.setattr(finalists, "NUM_REFINED", 2)
        patch.setattr(evolution, "GENERATIONS", 2)
        patch.setattr(pipeline, "NUM_PROBE_SEGMENTS", 4)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny-llama", "llama", num_hidden_layers=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def families(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    folder, state = tmp_path_factory.mktemp("families"), torch.random.get_rng_state()
    made = {effort: anyfit.fit(tiny, data=text, output=folder / effort, effort=effort, **SMALL) for effort in ("low", "high")}
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state is never touched"
    return made


def test_three_words() -> None:
    assert [str(effort) for effort in Effort] == ["low", "normal", "high"]
    with pytest.raises(UserError, match="no effort 'max'"):
        Effort.parse("max")
    target = targets.get("llama.cpp")
    low, normal, high = (target.menu(effort) for effort in Effort)
    assert set(low) < set(normal) == set(high)


def test_low_refines_nothing_and_high_the_smallest(families: dict[str, Family]) -> None:
    assert not any(point.refined for point in families["low"].points)
    points = [point for point in families["high"].points if point.refined]
    assert 1 <= len(points) <= 2
    for point in points:
        plain, own = (families[effort].extract(point.config).parameters() for effort in ("low", "high"))
        assert any(not torch.equal(a, b) for a, b in zip(plain, own, strict=True))
    smallest = families["low"].frontier[0]
    better = families["high"].select(f"{smallest.bytes_} B")
    assert better.refined and better.search.kl_mean < 0.97 * smallest.search.kl_mean


def test_a_refined_point_is_what_its_model_measures_and_exports(families: dict[str, Family], tiny: Path, tmp_path: Path) -> None:
    family = families["high"]
    point = next(point for point in family.points if point.refined)
    measured = anyfit.evaluate(family.path, budget=f"{point.bytes_} B", against=tiny)
    assert measured.quality.kl_mean == pytest.approx(point.report.kl_mean, rel=1e-4)
    export = family.export(f"{point.bytes_} B", tmp_path / "small.gguf")
    assert export.bytes_ <= point.bytes_ and all(check.passed for check in export.checks)


def test_a_run_killed_while_it_refines_goes_on(
    families: dict[str, Family], tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refine, calls = Refinery.refine, []

    def killing(self: Refinery, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return refine(self, *args)

    monkeypatch.setattr(Refinery, "refine", killing)
    with pytest.raises(KeyboardInterrupt):
        anyfit.fit(tiny, data=text, output=tmp_path / "killed", effort="high", **SMALL)
    reference = finalists.Finalists._reference
    monkeypatch.setattr(finalists.Finalists, "_reference", lambda *_: pytest.fail("what evolution measured is kept"))
    again = anyfit.fit(tiny, data=text, output=tmp_path / "killed", effort="high", **SMALL)
    monkeypatch.setattr(finalists.Finalists, "_reference", reference)
    assert len(calls) == 3, "what was refined before isn't refined again"
    assert again.digest == families["high"].digest
    assert {path.name for path in again.path.iterdir()} == {path.name for path in families["high"].path.iterdir()}


def test_effort_is_part_of_what_a_run_is_made_of(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Fit, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            anyfit.fit(tiny, data=text, output=tmp_path / "x", effort="low", **SMALL)
    with pytest.raises(UserError, match=r"effort was 'low' and is 'high'|effort was low and is high"):
        anyfit.fit(tiny, data=text, output=tmp_path / "x", effort="high", **SMALL)


def test_plan_tells_what_effort_costs(tiny: Path, text: Path) -> None:
    low, high = (anyfit.plan(tiny, data=text, effort=effort, progress=Silent(), **SMALL) for effort in ("low", "high"))
    assert high.memory_bytes > low.memory_bytes
    assert high.formats == low.formats, "formats that were asked for stay what they are"


def test_windows_are_cut_evenly() -> None:
    tokens = torch.arange(3 * 600).reshape(3, 600)
    cut = windows(tokens, 5)
    assert cut.shape == (5, 200) and torch.equal(cut.flatten()[:600], tokens[0])
    assert windows(torch.arange(64).reshape(2, 32), 9).shape == (2, 32)


def test_nothing_to_refine_in_floats(tiny: Path, text: Path, tmp_path: Path) -> None:
    family = anyfit.fit(tiny, data=text, output=tmp_path / "floats", effort="high", **{**SMALL, "formats": ("F16", "BF16")})
    assert not any(point.refined for point in family.points)
    made = anyfit.refine(family, "100%", model=tiny)
    assert not made.kept and not made.already


def test_a_family_of_refined_points_only(tiny: Path, text: Path, tmp_path: Path) -> None:
    family = anyfit.fit(tiny, data=text, output=tmp_path / "one", effort="high", **{**SMALL, "formats": ("Q2_K",)})
    assert all(point.refined for point in family.points)
    assert family.expected(family.points[0].predicted) == pytest.approx(family.points[0].unrefined)
    assert family.export("100%", tmp_path / "one.gguf").point.refined
