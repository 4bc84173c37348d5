"""Families whose members differ in which weights are zero."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import anyfit
from anyfit import finalists, pipeline
from anyfit.api import prepare
from anyfit.core.budget import WEIGHTS
from anyfit.core.errors import BudgetError, UserError
from anyfit.family import Family
from anyfit.importance import saliencies
from anyfit.refinement import refine
from anyfit.report import page, sparsity, summary
from anyfit.structure import masks
from anyfit.structure.masks import Mask, mask_of, pack, unpack
from anyfit.testing.models import save_tiny

LENGTH = 32
ASKED = {"target": "transformers", "recipe": "essential-sparsity", "length": LENGTH, "segments": 8}


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path) -> Path:
    return tiny_llama_folder


@pytest.fixture(scope="module")
def few() -> pytest.MonkeyPatch:  # type: ignore[misc]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "SHARES", (80, 60, 40))
        patch.setattr(finalists, "NUM_FINALISTS", 3)
        patch.setattr(pipeline, "NUM_PROBE_SEGMENTS", 2)
        yield patch


@pytest.fixture(scope="module")
def family(model: Path, text: Path, few: None, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return anyfit.fit(model, data=text, output=tmp_path_factory.mktemp("families") / "tiny.family", **ASKED)  # type: ignore[arg-type]


def originals(model: Path) -> dict[str, Tensor]:
    """The matrices in the blocks."""
    return {name: t.float() for name, t in load_file(model / "model.safetensors").items() if ".layers." in name and t.ndim == 2}


def test_names_say_what_is_kept() -> None:
    for mask in (Mask("wanda", 70), Mask("magnitude", 2, 4)):
        assert mask_of(mask.choice("BF16")) == mask
    assert mask_of("BF16") is None and mask_of("heads2 F32") is None
    bits = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(unpack(pack(bits), 11), bits)


def test_one_mask_everywhere_is_the_papers(family: Family, model: Path) -> None:
    """All magnitudes in one pool: what is kept of any matrix is no smaller than what is removed of any other."""
    found = originals(model)
    network = family.extract("magnitude60% F32")
    kept = {name: network.get_parameter(name) != 0 for name in found}
    total = sum(mask.numel() for mask in kept.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == round(0.6 * total)
    assert all(torch.equal(network.get_parameter(name)[kept[name]], found[name][kept[name]]) for name in found)
    least = min(float(found[name].abs()[kept[name]].min()) for name in found)
    most = max(float(found[name].abs()[~kept[name]].max()) for name in found if not kept[name].all())
    assert least >= most * (1 - 2**-7)
    assert family.space.costs(family.space.uniform("magnitude60% F32"))[WEIGHTS] == round(0.6 * total)


@pytest.mark.parametrize("score", saliencies)
@pytest.mark.parametrize(("keep", "group"), masks.PATTERNS)
def test_patterns_are_exact(family: Family, model: Path, score: str, keep: int, group: int) -> None:
    network = family.extract(Mask(score, keep, group).choice("F32"))
    for name, original in originals(model).items():
        matrix = network.get_parameter(name).detach()
        assert ((matrix != 0).unflatten(1, (-1, group)).sum(-1) == keep).all()
        if score == "magnitude":
            best = original.abs().unflatten(1, (-1, group)).sort(descending=True).values[..., :keep]
            assert torch.equal(matrix.abs().unflatten(1, (-1, group)).sort(descending=True).values[..., :keep], best)


def test_rows_keep_what_weighs_most_for_their_inputs(family: Family, model: Path, text: Path) -> None:
    from anyfit.calibration.collect import collect
    from anyfit.progress import Silent

    run = prepare(model, data=text, **ASKED)  # type: ignore[arg-type]
    seen = collect(run.model, run.architecture, run.weights, run.segments.calibration, progress=Silent())
    network = family.extract("wanda40% F32")
    for weight in run.weights:
        if weight.block is not None:
            matrix, norms = network.get_parameter(weight.name).detach(), seen[str(weight.input)].diagonal.sqrt()
            scores = originals(model)[weight.name].abs() * norms
            assert ((matrix != 0).sum(1) == round(0.4 * weight.shape[1])).all()
            for row, mask in zip(scores, matrix != 0, strict=True):
                assert row[mask].min() >= row[~mask].max() * (1 - 1e-5)


def test_budgets_are_of_weights_and_members_are_written(family: Family, tmp_path: Path) -> None:
    point = family.select("weights <= 55%")
    costs = family.space.costs(point.config)
    assert costs[WEIGHTS] <= 0.55 * family.space.costs(family.space.largest())[WEIGHTS]
    assert point.bytes_ == family.point(family.space.largest()).bytes_
    for budget, folder in (("weights <= 55%", "mixed"), ("wanda2of4 F32", "pattern")):
        made = family.export(budget, tmp_path / folder)
        assert all(check.passed for check in made.checks) and "masks" in [check.name for check in made.checks]
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        inside = [p for name, p in loaded.named_parameters() if ".layers." in name and p.ndim == 2]
        assert sum(int((p != 0).sum()) for p in inside) == family.space.costs(made.point.config)[WEIGHTS]
    assert all(((p != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all() for p in inside)
    family.save("wanda2of4 F32", tmp_path / "extracted")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "extracted")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in loaded.named_parameters())


def test_a_mask_with_other_zeros_is_found() -> None:
    matrix = torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    assert Mask("wanda", 3, 4).holds(matrix) and not Mask("wanda", 2, 4).holds(matrix)
    assert Mask("wanda", 50).holds(matrix) and not Mask("wanda", 50).holds(torch.ones(2, 2))


def test_what_is_shown(family: Family) -> None:
    found = sparsity.to_json(family)
    assert set(found) == set(saliencies) and json.loads(json.dumps(summary.family_json(family)))["sparsity"] == found
    for score, curve in found.items():
        assert [row["removed"] for row in curve["shares"]] == [0, 0.2, 0.4, 0.6]
        assert curve["shares"][0]["perplexity"] == family.original.report.perplexity
        measured = next(p for p in family.points if p.uniform == Mask(score, 40).choice("F32"))
        assert measured.report is not None and curve["shares"][-1]["perplexity"] == measured.report.perplexity
        assert [(row["keep"], row["group"]) for row in curve["patterns"]] == [(4, 8), (2, 4), (1, 2)]
    html = page.render(family)
    assert "Where quality drops off" in html and html.count('class="knee"') == len(found)
    assert r"--budget ${row.budget}" in html and r"weights \u003c= " in html


def test_knees_and_what_is_free() -> None:
    shares = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert sparsity.knee(shares, np.log([8, 8, 8.02, 8.1, 30, 200]).tolist()) == 0.3
    assert sparsity.free(shares, np.log([8, 8, 8.02, 8.1, 8.0, 200]).tolist()) == 0.2


def test_the_plainest_rule_wins_over_chance(family: Family) -> None:
    for share in (0.2, 0.4):
        kl = {score: next(r["loss"] for r in curve["shares"] if r["removed"] == share) for score, curve in sparsity.to_json(family).items()}
        assert max(kl["magnitude"], kl["wanda"]) < kl["random"]


def test_what_can_not_be_asked_for(family: Family, model: Path, text: Path) -> None:
    with pytest.raises(UserError, match="one floating-point format"):
        prepare(model, data=text, **ASKED, formats=["F32", "F16"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one floating-point format"):
        prepare(model, data=text, **ASKED, formats=["int8_sym"])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Saturation is about rounding"):
        anyfit.plan(model, data=text, saturation=True, **ASKED)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="was masked by essential-sparsity"):
        refine(family, "weights <= 50%")
    with pytest.raises(BudgetError, match="smallest possible is weights <= "):
        family.select("weights <= 1%")
    with pytest.raises(BudgetError, match="smallest possible is") as refused:
        family.select("50%")
    assert "weights <= 50%" in refused.value.remedy


def test_rows_that_no_pattern_fits_stay_whole(text: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "odd", intermediate_size=130)
    run = prepare(folder, data=text, **ASKED)  # type: ignore[arg-type]
    down = next(d for d in run.space.decisions if d.unit.name.endswith("0.mlp.down_proj.weight"))
    assert "wanda2of4 F32" in down.refused and "wanda1of2 F32" not in down.refused
    config = run.space.uniform("wanda2of4 F32")
    assert config[down.key] == "F32"
    assert {name for (unit, _), name in config.items() if ".layers." in unit and "down_proj" not in unit} == {"wanda2of4 F32"}


def test_masks_are_kept_as_bits(family: Family) -> None:
    for name, own in groupby(sorted((family.path / "variants").iterdir()), key=lambda path: path.name):
        if ".layers." in name:
            (path,) = own
            tensors = load_file(path)
            dense = tensors["F32"].numel()
            assert sum(t.numel() for t in tensors.values()) == dense + (len(tensors) - 1) * dense // 32


def test_plans_know_what_masks_and_scores_take(family: Family, model: Path, text: Path) -> None:
    asked = {**ASKED, "data": text}
    found = anyfit.plan(model, budget="weights <= 60%", **asked)  # type: ignore[arg-type]
    assert found.smallest_bytes == found.largest_bytes == family.points[0].bytes_
    files = sum(path.stat().st_size for path in (family.path / "variants").iterdir())
    assert found.seconds > 0 and found.disk_bytes > 0.9 * files
    with pytest.raises(BudgetError, match="smallest possible is weights <= "):
        anyfit.plan(model, budget="weights <= 1%", **asked)  # type: ignore[arg-type]
    by_network, by_matrix = (anyfit.plan(model, **{**asked, "recipe": recipe}) for recipe in ("optin", "ziplm"))  # type: ignore[arg-type]
    assert by_network.memory_bytes >= 4 * by_network.num_parameters and by_network.seconds > 0 < by_matrix.seconds
