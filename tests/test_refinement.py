"""Solving a config again for what really arrives, and what the family then holds."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import anyfit
from anyfit import Family, refinement
from anyfit.architectures import architecture_of
from anyfit.calibration.statistics import InputStatistics
from anyfit.checkpoint import Checkpoint
from anyfit.core.errors import FamilyError, ModelError, UserError
from anyfit.core.units import Weight
from anyfit.family.manifest import Point
from anyfit.progress import Silent
from anyfit.refinement import refine
from anyfit.tasks.language import Quality
from anyfit.testing.models import save_tiny, tiny_text
from anyfit.tuning.sequential import resolve

FORMATS = ("Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny-llama", "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def fitted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    text = folder / "notes.txt"
    text.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    return anyfit.fit(tiny, data=text, output=folder / "tiny.family", formats=FORMATS, length=32, segments=16).path


@pytest.fixture
def family(fitted: Path, tmp_path: Path) -> Family:
    return Family.open(shutil.copytree(fitted, tmp_path / "copy.family"))


@torch.no_grad()
def test_targets_are_the_least_squares_answer(tiny: Path) -> None:
    """A network whose first projections are off: what is asked of the later ones gives the original's outputs back."""
    original, stored = Checkpoint.open(tiny).load(), Checkpoint.open(tiny).load()
    architecture = architecture_of(original)
    weights = list(architecture.weights(original))
    tokens = torch.randint(0, original.config.vocab_size, (16, 24), generator=torch.Generator().manual_seed(0))
    errors = {}

    def encode(group: Sequence[Weight], targets: Sequence[Tensor], statistics: InputStatistics) -> list[Tensor]:
        assert statistics.count == tokens.numel()
        for weight, target in zip(group, targets, strict=True):
            errors[weight.name] = float((target - original.get_parameter(weight.name)).norm())
        return [target * 0.8 if weight.role == "v" and weight.block == 0 else target for weight, target in zip(group, targets, strict=True)]

    resolve(stored, original, architecture, weights, tokens, encode, progress=Silent())
    first = [name for name in errors if "layers.0" in name]
    assert all(errors[name] < 1e-3 for name in first if "o_proj" not in name and "mlp" not in name), "nothing arrives changed there"
    assert errors[next(name for name in first if "o_proj" in name)] > 0.1, "values that are a fifth too small ask for more"
    kept = original.get_parameter("model.embed_tokens.weight")
    assert torch.equal(stored.get_parameter("model.embed_tokens.weight"), kept), "what is outside the blocks stays"
    with_target = (stored(tokens).logits - original(tokens).logits).norm()
    spoiled = Checkpoint.open(tiny).load()
    spoiled.get_parameter("model.layers.0.self_attn.v_proj.weight").mul_(0.8)
    assert with_target < 0.5 * (spoiled(tokens).logits - original(tokens).logits).norm()


def test_a_refined_size_is_closer_and_exported_as_it_is(family: Family, tiny: Path, tmp_path: Path) -> None:
    budget = f"{family.space.bytes_(family.space.smallest())} B"
    before, digest, num_points = family.select(budget), family.digest, len(family.points)
    plain = family.extract(before.config)
    made = refine(family, budget, model=tiny)
    assert made.kept and made.after.kl_mean < made.before.kl_mean
    again = Family.open(family.path)
    chosen = again.select(budget)
    assert chosen.refined and chosen.config == before.config and chosen.bytes_ == before.bytes_
    assert again.digest == family.digest != digest
    export = again.export(budget, tmp_path / "refined.gguf")
    assert export.bytes_ == before.bytes_ and all(check.passed for check in export.checks)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(again.extract(budget).get_parameter(name), plain.get_parameter(name))
    others = [point for point in again.points if point.config != chosen.config]
    assert not any(point.refined for point in others) and len(others) == num_points - (before.search is not None)
    assert not refine(again, budget, model=tiny).kept, "there is nothing to do twice"
    larger = f"{sum(map(family.space.bytes_, (family.space.smallest(), family.space.largest()))) // 2} B"
    assert not again.select_unrefined(larger).refined, "a smaller refined config doesn't keep a larger one from being refined"


def test_only_the_very_original_will_do(family: Family, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama", tie_word_embeddings=False)
    with pytest.raises(ModelError, match="content differs"):
        refine(family, "90%", model=other)
    assert not (family.path / "refined").exists()


def test_what_takes_too_much_memory_is_refused(family: Family, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = 4 * family.original.num_parameters
    monkeypatch.setattr("anyfit.core.memory.free", lambda: 8 * network)
    with pytest.raises(UserError, match=r"Refining tiny-llama takes .* 8 times the network in float32") as raised:
        refine(family, "90%", model=tiny, device="cpu")
    assert "--memory" in raised.value.remedy and not (family.path / "refined").exists()
    with pytest.raises(UserError, match="may be used"):
        refine(family, "90%", model=tiny, device="cpu", memory=f"{8 * network - 1} B")
    assert refine(family, "90%", model=tiny, device="cpu", memory=f"{8 * network} B").before
    monkeypatch.setattr("anyfit.core.memory.free", lambda: 11 * network)
    assert refine(family, "90%", model=tiny, device="cpu").before


def test_two_sizes_of_one_family(family: Family, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are kept, whether they help a random network or not."""

    def kept(point: Point, quality: Mapping[str, Quality]) -> Point:
        return replace(point, search=quality["search"], report=quality["report"], unrefined=point.search.kl_mean)

    monkeypatch.setattr(refinement, "refined", kept)
    sizes = sorted(map(family.space.bytes_, (family.space.smallest(), family.space.largest())))
    for budget in (f"{sizes[0]} B", f"{(7 * sizes[0] + sizes[1]) // 8} B"):
        assert refine(family, budget, model=tiny).point.refined
        assert refine(family, budget, model=tiny).already
    assert sum(point.refined for point in Family.open(family.path).points) == 2
    assert {path.name for path in (family.path / "refined").iterdir()} == {
        f"{p.config.digest}.safetensors" for p in family.points if p.refined
    }


def test_a_family_that_became_another_is_left_alone(family: Family, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (family.path / "family.json").read_bytes()
    monkeypatch.setattr(Family, "reload", lambda self: setattr(self, "manifest", replace(self.manifest, provenance={"seed": 5})))
    with pytest.raises(FamilyError, match="another family"):
        refine(family, f"{family.space.bytes_(family.space.smallest())} B", model=tiny)
    assert (family.path / "family.json").read_bytes() == data


def test_without_the_original_it_is_asked_for(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="isn't at hand") as raised:
        refine(family, "90%")
    assert "--model" in raised.value.remedy
