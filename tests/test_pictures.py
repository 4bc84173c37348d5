"""Networks of pictures: read from files, pruned, taken out and written, and the same where they run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTModel

import anyfit
from anyfit.architectures import architecture_of
from anyfit.calibration import pictures
from anyfit.core.budget import MACS
from anyfit.core.errors import DataError, ModelError, UserError
from anyfit.family import Family
from anyfit.importance.trajectory import trajectories
from anyfit.interface import PICTURES
from anyfit.progress import Silent
from anyfit.recipes import recipes
from anyfit.structure.cutting import sizes
from anyfit.structure.levels import kept_of
from anyfit.tasks import classes
from anyfit.testing.models import save_tiny, tiny_model
from anyfit.trainers import loop

ASKED = {"recipe": "ziplm", "segments": 12, "effort": "low"}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blobs of colour, of several sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32 + index % 3, 32), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny", "vit")
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": MEAN, "image_std": STD, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module", params=["transformers", "onnxruntime"])
def family(request: pytest.FixtureRequest, model: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    if request.param == "onnxruntime":
        pytest.importorskip("onnxscript", reason="needs anyfit[onnxruntime]")
    output = tmp_path_factory.mktemp("families") / "tiny.family"
    return anyfit.fit(model, output=output, data=photographs, target=request.param, **ASKED)


def test_pictures_become_numbers_as_the_model_says(photographs: Path, model: Path) -> None:
    config = ViTConfig.from_pretrained(model)
    found = pictures.read(photographs / "0.png", model, config)
    colours = np.asarray(Image.open(photographs / "0.png"), np.float64) / 255
    assert found.shape == (3, 32, 32)
    assert np.allclose(found.permute(1, 2, 0).numpy(), (colours - MEAN) / STD, atol=1e-5)
    assert pictures.read(photographs / "1.png", model, config).shape == (3, 32, 32), "resized"


def test_no_picture_serves_two_purposes(family: Family) -> None:
    text = family.text()
    digests = [picture.numpy().tobytes() for own in text.values() for picture in own]
    assert len(digests) == len(set(digests)) and all(own.dtype == torch.float32 and len(own) for own in text.values())


@pytest.mark.parametrize("budget", ["90%", "macs <= 60%"])
def test_what_is_extracted_is_small_and_as_close_as_was_measured(family: Family, model: Path, budget: str) -> None:
    point, cut, text = family.select(budget), family.extract(budget), family.text()["report"]
    kept = [kept_of(point.config[decision.key]) for decision in family.space.decisions]
    assert [n for own in sizes(cut, architecture_of(cut)) for n in (own.groups, own.channels)] == kept
    original = AutoModelForImageClassification.from_pretrained(model).eval()
    with torch.no_grad():
        expected, found = (network(pixel_values=text).logits.double().softmax(-1) for network in (original, cut))
    divergence = float((expected * (expected.log() - found.log())).sum(-1).mean())
    assert classes.TASK.reference(original, text).measured(cut).loss == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    if point.report is not None:
        assert point.report.loss == pytest.approx(divergence, rel=1e-2, abs=1e-6)


def test_multiply_adds_are_those_of_the_extracted_network(family: Family) -> None:
    """Every matrix in the blocks once a position, the classifier once a picture, and each query with all keys and values."""
    for budget in ("100%", "macs <= 60%"):
        network, point = family.extract(budget), family.select(budget)
        linear = sum(module.weight.numel() for module in network.modules() if isinstance(module, torch.nn.Linear))
        wide = [own.groups * own.heads * own.head_dim for own in sizes(network, architecture_of(network))]
        assert family.space.costs(point.config)[MACS] == linear + 2 * PICTURES.length(network.config) * sum(wide)


def test_the_largest_is_the_original(family: Family, model: Path) -> None:
    text, original = family.text()["report"], AutoModelForImageClassification.from_pretrained(model)
    assert torch.equal(PICTURES(family.extract(family.space.largest()), text), PICTURES(original, text))


@pytest.mark.parametrize("budget", ["92%", "smallest"])
def test_exported_folders_are_checked_where_they_run(family: Family, tmp_path: Path, budget: str) -> None:
    budget = f"{family.space.bytes_(family.space.smallest())}B" if budget == "smallest" else budget
    made = family.export(budget, tmp_path / "small")
    assert all(check.passed for check in made.checks), made.checks
    assert (tmp_path / "small" / "preprocessor_config.json").is_file()
    assert "image" in (tmp_path / "small" / "README.md").read_text()


def test_what_is_written_is_measured_on_other_pictures(family: Family, model: Path, photographs: Path) -> None:
    found = anyfit.evaluate(family.path, budget="80%", data=photographs, against=model)
    assert found.quality.loss > 0 and found.quality.num_segments == 40 and found.text == "40 pictures"
    again = anyfit.evaluate(family.path, budget=f"{family.space.bytes_(family.space.largest())}B", against=model)
    assert again.quality.loss == pytest.approx(0, abs=1e-9) and again.quality.num_segments == len(family.text()["report"])


def test_structures_that_later_blocks_miss_least_are_left_out(model: Path, photographs: Path, tmp_path: Path) -> None:
    wishes = {**ASKED, "recipe": "optin", "data": photographs, "target": "transformers"}
    assert anyfit.plan(model, **wishes).seconds > 0
    family = anyfit.fit(model, output=tmp_path / "small.family", **wishes)
    original, network = family.extract(family.space.largest()), family.extract("macs <= 60%")
    text, architecture = family.text()["calibration"], architecture_of(original)
    found = trajectories(original, architecture, text, channels_together=1, progress=Silent())
    kept = sizes(network, architecture)
    assert kept != sizes(original, architecture)
    for index, (scores, own) in enumerate(zip(found, kept, strict=True)):
        whole, cut = (network.get_submodule(f"vit.layers.{index}.mlp.fc2").weight for network in (original, network))
        best = scores.channels.argsort(descending=True)[: own.channels].sort().values
        assert torch.equal(cut, whole[:, best])


def test_a_pruned_network_of_pictures_is_trained_from_its_states(
    model: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, settings = recipes.get("ziplm"), loop.Settings(num_steps=40, batch_size=4, rate=3e-3)
    assert recipe.recovery is not None
    monkeypatch.setitem(recipe.__dict__, "recovery", replace(recipe.recovery, settings=settings))
    wishes = {**ASKED, "effort": "normal", "data": photographs, "target": "transformers", "recover": ["macs <= 40%"]}
    family = anyfit.fit(model, output=tmp_path / "tiny.family", **wishes)
    point = next(point for point in family.points if point.refined)
    assert point.search is not None and point.unrefined is not None and point.search.loss < point.unrefined
    text = family.text()["search"]
    reference = classes.TASK.reference(AutoModelForImageClassification.from_pretrained(model).eval(), text)
    assert reference.measured(family.extract("macs <= 40%")).loss == pytest.approx(point.search.loss, rel=1e-4)
    made = family.export("macs <= 40%", tmp_path / "small")
    assert made.point.config == point.config and all(check.passed for check in made.checks), made.checks


def test_what_a_fit_would_take(model: Path, photographs: Path) -> None:
    plan = anyfit.plan(model, data=photographs, target="transformers", **ASKED)
    assert plan.smallest_bytes < plan.largest_bytes <= 1.01 * plan.original_bytes and plan.seconds > 0


def test_formats_of_a_network_of_pictures(model: Path, photographs: Path, tmp_path: Path) -> None:
    """Its classifier is decided, too: it reads one position of each picture."""
    pytest.importorskip("onnxscript", reason="needs anyfit[onnxruntime]")
    wishes = {"segments": 12, "effort": "low", "formats": ("F32", "int8_sym", "int4_sym")}
    family = anyfit.fit(model, output=tmp_path / "formats.family", data=photographs, target="onnxruntime", **wishes)
    assert any(decision.unit.name == "classifier.weight" for decision in family.space.decisions)
    made = family.export("50%", tmp_path / "small")
    assert all(check.passed for check in made.checks), made.checks
    assert made.checks[-1].detail.endswith("on 2 pictures")


def test_drawn_gradients_have_the_curvature_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)  # not so large that a class is all but never drawn
    hidden, matrix = torch.randn(1, 2, 4, generator=generator), 0.5 * torch.randn(4, 5, generator=generator)

    def run(states: torch.Tensor) -> torch.Tensor:
        return states[:, 0] @ matrix

    drawn = torch.stack([classes.TASK.pull(run, hidden, hidden, seed).flatten() for seed in range(6000)])
    curvature = drawn.T @ drawn / len(drawn)
    expected = run(hidden).double().log_softmax(-1)
    for seed in range(5):
        step = 1e-2 * torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(seed))
        moved = run(hidden + step).double().log_softmax(-1)
        divergence = float((expected.exp() * (expected - moved)).sum())
        assert divergence == pytest.approx(0.5 * float(step.flatten() @ curvature @ step.flatten()), rel=0.25)


def test_what_cannot_be_read_is_refused(model: Path, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    whole = bytearray((photographs / "0.png").read_bytes())
    whole[len(whole) // 2] ^= 255
    (tmp_path / "damaged.png").write_bytes(whole)
    (tmp_path / "nothing").mkdir()
    for data, error, said in (
        (tmp_path / "nothing", DataError, "has no pictures"),
        (tmp_path / "none", DataError, "no file or folder"),
        (photographs / "0.png", DataError, "three purposes"),
        (tmp_path / "broken.png", DataError, "no picture that can be read"),
        ([tmp_path / "broken.png", photographs / "0.png", photographs / "1.png"], DataError, "no picture that can be read"),
        ([tmp_path / "damaged.png", photographs / "0.png", photographs / "1.png"], DataError, "no picture that can be read"),
    ):
        with pytest.raises(error, match=said):
            anyfit.fit(model, output=tmp_path / "x.family", data=data, target="transformers", **ASKED)
    with pytest.raises(UserError, match="17 positions"):
        anyfit.fit(model, output=tmp_path / "x.family", data=photographs, target="transformers", length=64, **ASKED)
    for said in ("{", json.dumps({"image_mean": [0.5, 0.5]}), json.dumps({"image_std": [0.5, 0, 0.5]})):
        (tmp_path / "preprocessor_config.json").write_text(said)
        with pytest.raises(ModelError, match="no image_mean and image_std of 3 channels"):
            pictures.read(photographs / "0.png", tmp_path, ViTConfig.from_pretrained(model))
    ViTModel(tiny_model("vit").config).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="AutoModelForImageClassification"):
        anyfit.fit(tmp_path / "bare", output=tmp_path / "x.family", data=photographs)
