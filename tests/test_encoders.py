"""Encoders of text: what is fitted, taken out and written is as close to the original as was measured, and runs as it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

import anyfit
from anyfit import measuring
from anyfit.api import prepare
from anyfit.architectures import architecture_of
from anyfit.calibration.collect import collect
from anyfit.calibration.data import PURPOSES, load
from anyfit.core.budget import LATENCY
from anyfit.core.config import HEADS, WIDTH
from anyfit.core.errors import DataError, ModelError, UserError
from anyfit.costs.latency import ATTENTION, FEED_FORWARD, Device, LatencyTable, Setting
from anyfit.costs.probes import shape_of
from anyfit.family import Family
from anyfit.importance.trajectory import trajectories
from anyfit.interface import PADDING, TEXTS
from anyfit.progress import Silent
from anyfit.recipes import recipes
from anyfit.structure.cutting import sizes
from anyfit.structure.levels import kept_of, widths
from anyfit.tasks import embedding
from anyfit.testing.models import save_tiny, tiny_model, tiny_text
from anyfit.trainers import loop

LENGTH = 24
ASKED = {"recipe": "ziplm", "length": LENGTH, "segments": 12, "effort": "low"}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.jsonl"
    path.write_text("\n".join(json.dumps({"text": tiny_text(1 + seed % 7, seed=seed)}) for seed in range(120)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "bert")


@pytest.fixture(scope="module", params=["transformers", "onnxruntime"])
def family(request: pytest.FixtureRequest, model: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    if request.param == "onnxruntime":
        pytest.importorskip("onnxscript", reason="needs anyfit[onnxruntime]")
    output = tmp_path_factory.mktemp("families") / "tiny.family"
    return anyfit.fit(model, output=output, data=sentences, target=request.param, **ASKED)


def embeddings(model: torch.nn.Module, segments: Tensor) -> Tensor:
    """As sentence-transformers makes them, text by text, so that nothing is padded."""
    found = []
    for segment in segments:
        tokens = segment[segment != PADDING][None]
        with torch.no_grad():
            found.append(model(input_ids=tokens).last_hidden_state.mean(1))
    return torch.cat(found)


def test_each_text_is_a_segment_with_padding(family: Family, model: Path) -> None:
    text, tokenizer = family.text()["report"], AutoTokenizer.from_pretrained(model)
    assert (text == PADDING).any() and not (text == PADDING).all(0).any(), "no longer than the longest"
    lines = {tuple(tokenizer(tiny_text(1 + seed % 7, seed=seed))["input_ids"][: LENGTH - 1]) for seed in range(120)}
    for segment in text:
        tokens = segment[segment != PADDING].tolist()
        assert tokens[0] == 0 and tokens[-1] == 1
        assert any(tuple(tokens[:-1]) == line[: len(tokens) - 1] for line in lines)


@pytest.fixture
def latencies(model: Path, tmp_path: Path) -> LatencyTable:
    """By a formula; what is in no block takes 1 ms, and 3 ms in integers."""
    pytest.importorskip("onnxscript", reason="needs anyfit[onnxruntime]")
    shape = shape_of(AutoConfig.from_pretrained(model))
    modules = {(ATTENTION, groups, "F32"): 0.5 * groups for groups in range(1, shape.groups + 1)}
    modules |= {(FEED_FORWARD, width, "F32"): width / 1024 for width in widths(shape.width)}
    modules |= {(kind, size, "int8_sym"): ms / 2 for (kind, size, _), ms in modules.items()}
    blocks = shape.blocks * (modules[ATTENTION, shape.groups, "F32"] + modules[FEED_FORWARD, shape.width, "F32"])
    device = Device.here(measuring._stopwatch("onnxruntime").runtime, 1)
    whole = {"F32": blocks + 1.0, "int8_sym": blocks / 2 + 3.0}
    made = LatencyTable("onnxruntime", device, Setting(1, LENGTH), shape, whole, modules, dict.fromkeys(whole, 1.0))
    made.write(tmp_path / "latency.json")
    return made


@pytest.mark.parametrize("formats", [None, ("F32", "int8_sym")])
def test_what_is_in_no_block_takes_time_too(
    formats: tuple[str, ...] | None, model: Path, sentences: Path, latencies: LatencyTable, tmp_path: Path
) -> None:
    """An encoder of texts has no head that it could be counted with."""
    run = prepare(model, data=sentences, target="onnxruntime", latency=tmp_path / "latency.json", formats=formats, **ASKED)
    assert run.space.costs(run.space.largest())[LATENCY] == pytest.approx(latencies.whole["F32"])
    embedding = [decision for decision in run.space.decisions if "embedding" in decision.unit.name]
    assert [choice.others[LATENCY] for decision in embedding for choice in decision.choices] == pytest.approx([1.0, 3.0] if formats else [])


def test_what_was_not_timed_is_not_offered(model: Path, sentences: Path, latencies: LatencyTable, tmp_path: Path) -> None:
    """It may take longer than float32, and then a budget in milliseconds would be exceeded."""
    formats = ("int8_sym", "int8_dynamic", "int4_sym")
    with pytest.raises(UserError, match="measured in F32, int8_sym, and not in int8_dynamic, int4_sym") as refused:
        prepare(model, data=sentences, target="onnxruntime", latency=tmp_path / "latency.json", formats=formats, **ASKED)
    assert "anyfit measure MODEL --target onnxruntime --formats F32,int8_sym,int8_dynamic,int4_sym." in refused.value.remedy
    assert refused.value.remedy.endswith("--formats F32,int8_sym.")


@pytest.mark.parametrize("budget", ["90%", "70%", "macs <= 50%"])
def test_what_is_extracted_is_small_and_as_close_as_was_measured(family: Family, model: Path, budget: str) -> None:
    point = family.select(budget)
    cut, text = family.extract(budget), family.text()["report"]
    kept = [kept_of(point.config[decision.key]) for decision in family.space.decisions]
    assert [decision.axis for decision in family.space.decisions] == [HEADS, WIDTH] * 2
    assert [n for own in sizes(cut, architecture_of(cut)) for n in (own.groups, own.channels)] == kept
    cosines = torch.cosine_similarity(embeddings(cut, text), embeddings(AutoModel.from_pretrained(model), text), dim=-1)
    found = embedding.TASK.reference(AutoModel.from_pretrained(model).eval(), text).measured(cut)
    assert found.loss == pytest.approx(1 - float(cosines.mean()), abs=1e-5)
    if point.report is not None:
        assert point.report.loss == pytest.approx(found.loss, abs=1e-5)


def test_the_largest_is_the_original(family: Family, model: Path) -> None:
    text = family.text()["report"]
    original, largest = AutoModel.from_pretrained(model), family.extract(family.space.largest())
    assert torch.equal(TEXTS(largest, text), TEXTS(original, text))
    assert family.point(family.space.largest()).plain_loss == 0


@pytest.mark.parametrize("budget", ["92%", "75%"])
def test_exported_folders_are_checked_where_they_run(family: Family, tmp_path: Path, budget: str) -> None:
    made = family.export(budget, tmp_path / "small")
    assert all(check.passed for check in made.checks), made.checks
    assert any("last_hidden_state" in check.detail or check.name == "last_hidden_state" for check in made.checks)
    assert "cosine" in (tmp_path / "small" / "README.md").read_text()


def test_nothing_left_in_the_blocks(family: Family, tmp_path: Path) -> None:
    made = family.export(f"{family.space.bytes_(family.space.smallest())}B", tmp_path / "nothing")
    assert all(check.passed for check in made.checks), made.checks


def test_bytes_are_those_predicted(family: Family, tmp_path: Path) -> None:
    made = family.export("75%", tmp_path / "small", check=False)
    written = sum(file.stat().st_size for file in (tmp_path / "small").iterdir() if file.suffix in (".onnx", ".safetensors"))
    assert written == made.bytes_ <= made.point.bytes_ <= 1.01 * made.bytes_


def test_running_text_is_cut_into_full_segments(model: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(tiny_text(3000), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    wanted = {"num_calibration": 20, "num_search": 4, "num_report": 4}
    found = load(tmp_path / "book.txt", tokenizer, length=LENGTH, texts=True, **wanted)
    for purpose in PURPOSES:
        tokens = getattr(found, purpose)
        assert tokens.shape == (wanted[f"num_{purpose}"], LENGTH) and (tokens != PADDING).all()
        assert (tokens[:, 0] == 0).all() and (tokens[:, -1] == 1).all() and (tokens[:, 1:-1] > 1).all()


def test_what_a_fit_would_take(model: Path, sentences: Path) -> None:
    plan = anyfit.plan(model, data=sentences, target="transformers", **ASKED)
    assert plan.smallest_bytes < plan.largest_bytes <= 1.01 * plan.original_bytes and plan.seconds > 0


@pytest.mark.parametrize("target", ["onnxruntime", "transformers"])
def test_formats_of_an_encoder(model: Path, sentences: Path, tmp_path: Path, target: str) -> None:
    pytest.importorskip("onnxscript" if target == "onnxruntime" else "compressed_tensors", reason="needs an extra")
    wishes = {"length": LENGTH, "segments": 12, "effort": "low", "formats": ("F16", "int8_sym", "int4_sym")}
    family = anyfit.fit(model, output=tmp_path / "formats.family", data=sentences, target=target, **wishes)
    made = family.export("30%", tmp_path / "small")
    assert all(check.passed for check in made.checks), made.checks
    assert made.point.report is None or made.point.report.loss > 0


def test_padding_is_no_part_of_the_statistics(model: Path) -> None:
    """Moments of padded texts are those of the same texts, each run by itself."""
    network = AutoModel.from_pretrained(model).eval()
    architecture = architecture_of(network)
    weights = list(architecture.weights(network))
    tokens = torch.randint(2, 500, (6, 15), generator=torch.Generator().manual_seed(0))
    for index in range(6):
        tokens[index, 4 + 2 * index :] = PADDING
    found = collect(network, architecture, weights, tokens, progress=Silent())
    sums: dict[str, Tensor] = {}
    for segment in tokens:
        alone = segment[segment != PADDING][None]
        for name, own in collect(network, architecture, weights, alone, progress=Silent()).items():
            sums[name] = sums.get(name, 0) + own.hessian * alone.numel()
    num_tokens = int((tokens != PADDING).sum())
    for name, own in found.items():
        assert own.count == num_tokens
        # Some processors read texts in bfloat16, and what comes out depends a little on what is read together. Padding would add a lot.
        alone = sums[name] / num_tokens
        assert (own.hessian - alone).norm() < 5e-3 * alone.norm(), name


def test_what_comes_after_a_text_changes_nothing(model: Path) -> None:
    network = AutoModel.from_pretrained(model).eval()
    text = torch.randint(2, 500, (3, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([text, torch.full((3, 5), PADDING)], 1)
    assert torch.allclose(embedding.embedded(network, padded), embeddings(network, text), atol=1e-5)


def test_distances_are_those_of_cosines() -> None:
    a, b = torch.randn(7, 32), torch.randn(7, 32)
    assert torch.allclose(embedding.distances(a, b), 1 - torch.cosine_similarity(a.double(), b.double()), atol=1e-12)
    assert (embedding.distances(a, a.clone()) == 0).all()


def test_drawn_gradients_have_the_curvature_of_the_loss() -> None:
    """E[g gᵀ] against the loss of small steps: one less the cosine of the mean after a step d is about ½ dᵀ F d."""
    hidden, segment = torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64)
    segment[0, 2] = PADDING
    drawn = torch.stack([embedding.TASK.pull(lambda x: x, hidden, segment, seed).flatten() for seed in range(4000)])
    curvature = drawn.T @ drawn / len(drawn)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        step = 1e-2 * torch.randn(1, 3, 4, generator=generator)
        moved, before = (embedding.pooled(states, segment) for states in (hidden + step, hidden))
        expected = 0.5 * float(step.flatten() @ curvature @ step.flatten())
        assert float(embedding.distances(moved, before)) == pytest.approx(expected, rel=0.2)


def test_structures_of_an_encoder_that_later_blocks_miss_least_are_left_out(model: Path, sentences: Path, tmp_path: Path) -> None:
    wishes = {"data": sentences, "target": "transformers", "recipe": "optin", "length": LENGTH, "segments": 16}
    family = anyfit.fit(model, output=tmp_path / "small.family", **wishes)  # type: ignore[arg-type]
    original, network = family.extract(family.space.largest()), family.extract("macs <= 60%")
    architecture, whole = architecture_of(original), sizes(original, architecture_of(original))
    found = trajectories(original, architecture, family.text()["calibration"], channels_together=1, progress=Silent())
    kept = sizes(network, architecture)
    assert kept != whole
    for index, (scores, own) in enumerate(zip(found, kept, strict=True)):
        path = f"{architecture.block.format(i=index)}.{next(g['down'] for _, g in architecture.groups(index) if 'down' in g)}"
        best = scores.channels.argsort(descending=True)[: own.channels].sort().values
        assert torch.equal(network.get_submodule(path).weight, original.get_submodule(path).weight[:, best])
    assert all(check.passed for check in family.export("macs <= 60%", tmp_path / "folder").checks)


def test_what_an_encoder_cannot_do_is_refused(model: Path, sentences: Path, family: Family, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="writes nothing"):
        anyfit.fit(model, output=tmp_path / "x.family", target="transformers", **ASKED)
    with pytest.raises(UserError, match="no language model"):
        anyfit.fit(model, output=tmp_path / "x.family", data=sentences, target="transformers", recipe="llm-qfa", length=LENGTH)
    with pytest.raises(UserError, match="taylor knows of language; "):
        wishes = {"data": sentences, "target": "transformers", "recipe": "ziplm", "importance": "taylor", "length": LENGTH}
        anyfit.fit(model, output=tmp_path / "x.family", **wishes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="says nothing by itself"):
        anyfit.evaluate(model, data=sentences, length=LENGTH)
    found = anyfit.evaluate(family.path, budget="70%", data=sentences, against=model, length=LENGTH)
    assert 0 < found.quality.loss < 2 and found.quality.num_segments == 120
    config = BertConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(tmp_path / "masked")
    with pytest.raises(ModelError, match=r"AutoModel\.from_pretrained"):
        anyfit.fit(tmp_path / "masked", output=tmp_path / "x.family", data=sentences)


def test_tiny_encoders_differ_by_seed() -> None:
    tokens = torch.arange(12)[None]
    assert not torch.equal(TEXTS(tiny_model("bert"), tokens), TEXTS(tiny_model("bert", seed=1), tokens))


def test_a_pruned_encoder_is_trained_from_its_states(model: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, settings = recipes.get("ziplm"), loop.Settings(num_steps=60, batch_size=4, rate=3e-4)
    assert recipe.recovery is not None
    monkeypatch.setitem(recipe.__dict__, "recovery", replace(recipe.recovery, settings=settings))
    asked = {**ASKED, "effort": "normal", "segments": 48, "data": sentences, "target": "transformers"}
    family = anyfit.fit(model, output=tmp_path / "tiny.family", recover=["macs <= 20%"], **asked)
    point = next(point for point in family.points if point.refined)
    assert point.search is not None and point.unrefined is not None and point.search.loss < point.unrefined
    made = family.export("macs <= 20%", tmp_path / "small")
    assert made.point.config == point.config and all(check.passed for check in made.checks), made.checks
    found = anyfit.evaluate(tmp_path / "small", against=model, data=sentences, trust_remote_code=True)
    assert found.quality.loss > 0
