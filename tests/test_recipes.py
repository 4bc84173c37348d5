"""Every recipe: made of known parts, and a family comes out of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import anyfit
from anyfit import finalists, pipeline
from anyfit.formats import formats as formats_
from anyfit.importance import importances, saliencies
from anyfit.quantizers import quantizers
from anyfit.recipes import recipes
from anyfit.recipes.base import Nesting
from anyfit.report import summary
from anyfit.scores import sensitivities
from anyfit.targets import targets
from anyfit.testing.models import save_tiny, tiny_text


@pytest.mark.parametrize("name", recipes)
def test_a_recipe_is_made_of_known_parts_and_says_what_it_is(name: str) -> None:
    recipe = recipes.get(name)
    assert recipe.name == name and recipe.title and recipe.paper and len(recipe.about) > 80
    assert recipe.quantizer in quantizers and recipe.score in sensitivities
    assert recipe.pruning is None or recipe.pruning in importances
    assert all(name in saliencies for name in recipe.masks)
    assert all(menus and all(format_ in formats_ for menu in menus for format_ in menu) for menus in recipe.formats.values())


@pytest.mark.parametrize("name", recipes)
def test_a_family_comes_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalists, "NUM_FINALISTS", 3)
    monkeypatch.setattr(pipeline, "NUM_PROBE_SEGMENTS", 2)
    recipe = recipes.get(name)
    if recipe.training:
        few = replace(recipe.training, settings=replace(recipe.training.settings, num_steps=4))  # type: ignore[arg-type, type-var]
        monkeypatch.setitem(recipe.__dict__, "training", few)
    (tmp_path / "notes.txt").write_text("\n\n".join(tiny_text(300, seed=seed) for seed in range(20)))
    model = save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    target: str = "llama.cpp"
    formats: tuple[str, ...] | None = ("Q8_0", "Q4_0", "Q2_K")
    nested = isinstance(recipe.training, Nesting) or bool(recipe.needs)
    if recipe.masks or nested:
        formats = None
    if recipe.pruning or recipe.needs:
        target, formats = "transformers", None
    family = anyfit.fit(
        model,
        data=tmp_path / "notes.txt",
        output=tmp_path / "x.family",
        recipe=name,
        target=target,
        formats=formats,
        length=32,
        segments=8,
    )
    assert family.manifest.recipe == name and len(family.frontier) >= 2
    for decision in family.space.decisions if nested else ():
        (weight,), finest = decision.unit.weights, max(decision.choices, key=lambda choice: choice.stored_bytes)
        size = (family.path / "variants" / f"{weight.name}.safetensors").stat().st_size
        assert 0 < size - formats_.get(finest.name).bytes_(weight.shape) < 2**15, "the finest alone, and what the file says of it"
    middle = family.frontier[len(family.frontier) // 2]
    export = family.export(summary.budget_of(family, middle).strip("'"), tmp_path / f"x{targets.get(target).suffix}")
    assert all(check.passed for check in export.checks)
