"""Families whose sizes differ in heads and channels: what is stored, chosen, taken out and written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import anyfit
from anyfit import finalists, structuring
from anyfit.api import prepare
from anyfit.architectures import architecture_of
from anyfit.core.budget import BYTES, LATENCY, MACS, Budget
from anyfit.core.config import HEADS, WIDTH, Config, format_of
from anyfit.core.errors import BudgetError, ModelError, RuntimeMissingError, UserError
from anyfit.core.space import Space
from anyfit.costs.latency import ATTENTION, FEED_FORWARD, Device, LatencyTable, Setting
from anyfit.costs.probes import shape_of
from anyfit.elastic.extracted import InMemory
from anyfit.family import Family
from anyfit.family.store import Store
from anyfit.quantizers.base import Encoded
from anyfit.report import summary
from anyfit.scores.table import Table
from anyfit.searchers import evolution, layer_weights
from anyfit.searchers.base import Ranked
from anyfit.searchers.evolution import evolve
from anyfit.structure.cutting import cut, sizes
from anyfit.structure.levels import kept_of, widths
from anyfit.structure.space import kept_of_blocks
from anyfit.targets import targets
from anyfit.targets.base import Cut
from anyfit.targets.onnxruntime import _layout_of_cut
from anyfit.testing.models import save_tiny, tiny_tokenizer

LENGTH = 32
ASKED = {"target": "transformers", "recipe": "ziplm", "length": LENGTH, "segments": 8}
MENU = ("F32", "F16", "int8_sym", "int4_asym", "int4_sym_g128")

pytestmark = pytest.mark.usefixtures("few_sizes")


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path) -> Path:
    return tiny_llama_folder


def fitted(model: Path, text: Path, output: Path, **wishes: object) -> Family:
    return anyfit.fit(model, output=output, **{**ASKED, "data": text, "effort": "low", **wishes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def family(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return fitted(model, text, tmp_path_factory.mktemp("families") / "tiny.family")


def logits(network: torch.nn.Module, family: Family) -> Tensor:
    with torch.inference_mode():
        found: Tensor = network(input_ids=family.text()["report"][:2]).logits
    return found


def test_every_attention_and_feed_forward_is_decided(family: Family) -> None:
    axes = [decision.axis for decision in family.space.decisions]
    assert axes == [HEADS, WIDTH] * 2
    names = [[choice.name for choice in decision.choices] for decision in family.space.decisions[:2]]
    assert names == [["heads2 F32", "heads1 F32", "heads0 F32"], [f"width{kept} F32" for kept in (*widths(512), 0)]]


@pytest.mark.parametrize("name", ["magnitude", "wanda_repaired", "taylor"])
def test_another_importance_takes_out_others(name: str, family: Family, model: Path, text: Path, tmp_path: Path) -> None:
    other = fitted(model, text, tmp_path / "other.family", importance=name)
    assert other.manifest.provenance["importance"] == name and family.manifest.provenance["importance"] is None
    config = family.space.uniform(f"width{widths(512)[1]} F32")
    ours, theirs = (one.extract(config) for one in (family, other))
    assert not torch.equal(logits(ours, family), logits(theirs, family))
    assert all(check.passed for check in other.export("60%", tmp_path / "folder").checks)


def test_an_importance_is_looked_at_before_any_work(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gptq takes no heads and channels out"):
        fitted(model, text, tmp_path / "x.family", recipe="gptq", importance="obs")
    with pytest.raises(UserError, match=r"importance 'best'"):
        fitted(model, text, tmp_path / "x.family", importance="best")
    assert not list(tmp_path.iterdir())


def test_searched_layer_weights_compete(family: Family, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, search = list[Budget](), layer_weights.search

    def counted(*args: Any, budget: Budget, **more: Any) -> list[Ranked]:
        asked.append(budget)
        return search(*args, budget=budget, **more)

    monkeypatch.setattr(layer_weights, "search", counted)
    monkeypatch.setattr(layer_weights, "SETTINGS", layer_weights.Settings(drawn=4, most=6))
    searched = fitted(model, text, tmp_path / "searched.family", search="layer-weights")
    assert len(asked) > 2
    ours, theirs = ({point.config: point for point in one.points} for one in (searched, family))
    assert theirs.keys() <= ours.keys()
    for config, point in theirs.items():
        best = searched.select(f"{point.bytes_} B")
        assert ours[config].search == point.search and best.search is not None and point.search is not None
        assert best.search.loss <= point.search.loss


@pytest.mark.parametrize("budget", ["95%", "60%", "macs <= 50%", "30%"])
def test_what_is_extracted_is_small_and_computes_what_was_measured(family: Family, budget: str) -> None:
    """The cut network's outputs against the whole one with the stored matrices, which have zeros in what was taken out."""
    point = family.select(budget)
    cut = family.extract(budget)
    whole = family.source.build(dict(family._decoder(point.config).matrices(family.space, point.config)))
    assert torch.allclose(logits(cut, family), logits(whole, family), atol=1e-5)
    numbers = sum(parameter.numel() for parameter in cut.parameters())
    assert numbers < sum(parameter.numel() for parameter in whole.parameters())
    kept = [kept_of(point.config[decision.key]) for decision in family.space.decisions]
    assert [n for own in sizes(cut, architecture_of(cut)) for n in (own.groups, own.channels)] == kept


def test_the_largest_is_the_original(family: Family, model: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(model)
    assert torch.equal(logits(family.extract(family.space.largest()), family), logits(original, family))
    point = family.point(family.space.largest())
    assert point.search is not None and point.search.kl_mean == 0


@pytest.mark.parametrize("budget", ["90%", "55%"])
def test_exported_folders_have_the_predicted_bytes_and_load(family: Family, tmp_path: Path, budget: str) -> None:
    made = family.export(budget, tmp_path / "small")
    assert all(check.passed for check in made.checks), made.checks
    assert "trust_remote_code=True" in (tmp_path / "small" / "README.md").read_text()
    size = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert size == made.bytes_ == made.point.bytes_ <= dict(family.budget(budget).limits)[BYTES]


def test_nothing_left_in_the_blocks(family: Family, tmp_path: Path) -> None:
    least = family.space.bytes_(family.space.smallest())
    made = family.export(f"{least}B", tmp_path / "nothing")
    assert made.bytes_ == least and all(check.passed for check in made.checks)
    stored = load_file(tmp_path / "nothing" / "model.safetensors")
    assert not [name for name in stored if ".layers." in name], "norms of what was removed are gone, too"
    assert "removed" in (tmp_path / "nothing" / "README.md").read_text()
    shown = run_cli("show", str(family.path), "--budget", f"{least}B")
    assert "Removed from blocks: all of 0, 1." in shown and "heads0" not in shown.partition("Removed")[0].rpartition("block")[2]
    with pytest.raises(BudgetError, match=f"{least} B"):
        family.export(f"{least - 1}B", tmp_path / "less")


def run_cli(*arguments: str) -> str:
    from typer.testing import CliRunner

    from anyfit.cli import app

    ran = CliRunner().invoke(app, list(arguments))
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def test_what_was_removed_is_said_in_words(family: Family) -> None:
    config = family.space.smallest()
    names = {d.key: d.choices[0].name for d in family.space.decisions}
    attention, feed_forward = family.space.decisions[0].key, family.space.decisions[3].key
    for gone, said in (({attention}, "attention of 0"), ({attention, feed_forward}, "attention of 0; feed-forward of 1")):
        some = Config({key: config[key] if key in gone else name for key, name in names.items()})
        assert summary.removed_in_words(family.space, some) == f"Removed from blocks: {said}."
        assert summary.removed(family.space, some)["block"] == []
    assert summary.removed_in_words(family.space, family.space.largest()) == ""


def test_multiply_adds_are_those_of_the_extracted_network(family: Family) -> None:
    """Every matrix of the cut network once a token, and for each query the keys and values of half a sequence."""
    for budget in ("100%", "70%", "40%"):
        point, network = family.select(budget), family.extract(budget)
        linear = sum(module.weight.numel() for module in network.modules() if isinstance(module, torch.nn.Linear))
        widths_ = [own.groups * own.heads * own.head_dim for own in sizes(network, architecture_of(network))]
        assert family.space.costs(point.config)[MACS] == linear + LENGTH * sum(widths_)


def test_killed_and_continued(model: Path, text: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned: list[str] = []
    original = structuring._Pruner._prune

    def dies(self: structuring._Pruner, weight: object, hessian: Tensor) -> None:
        if len(pruned) == 2:
            raise KeyboardInterrupt
        pruned.append(weight.name)  # type: ignore[attr-defined]
        original(self, weight, hessian)  # type: ignore[arg-type]

    monkeypatch.setattr(structuring._Pruner, "_prune", dies)
    with pytest.raises(KeyboardInterrupt):
        fitted(model, text, tmp_path / "again.family")
    again: list[str] = []

    def counts(self: structuring._Pruner, weight: object, hessian: Tensor) -> None:
        again.append(weight.name)  # type: ignore[attr-defined]
        original(self, weight, hessian)  # type: ignore[arg-type]

    monkeypatch.setattr(structuring._Pruner, "_prune", counts)
    continued = fitted(model, text, tmp_path / "again.family")
    assert continued.digest == family.digest
    assert len(again) == 2 and not set(again) & set(pruned)


def made_table(model: Path, **changes: object) -> LatencyTable:
    """Latencies by a formula: attention is dear, and one width is slower than a larger one."""
    config = AutoModelForCausalLM.from_pretrained(model).config
    shape = shape_of(config)
    modules = {(ATTENTION, groups, "F32"): 0.5 * groups for groups in range(1, shape.groups + 1)}
    modules |= {(FEED_FORWARD, width, "F32"): 0.1 + width / 1024 for width in widths(shape.width)}
    modules[FEED_FORWARD, 128, "F32"] = modules[FEED_FORWARD, 256, "F32"] + 0.001
    whole = 1.0 + shape.blocks * (modules[ATTENTION, shape.groups, "F32"] + modules[FEED_FORWARD, shape.width, "F32"])
    from anyfit.measuring import _stopwatch

    device = Device.here(_stopwatch("transformers").runtime, 1)
    given = {
        "target": "transformers",
        "device": device,
        "setting": Setting(1, LENGTH),
        "shape": shape,
        "whole": {"F32": whole},
        "margins": {"F32": 1.1},
    }
    return LatencyTable(**{**given, "modules": modules, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fast(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("families")
    made_table(model).write(folder / "latency.json")
    return fitted(model, text, folder / "fast.family", latency=folder / "latency.json")


def test_budgets_in_milliseconds(model: Path, fast: Family) -> None:
    table, family = made_table(model), fast
    whole = family.space.costs(family.space.largest())[LATENCY]
    assert whole == pytest.approx(table.whole["F32"])
    for budget, bound in (("2x", whole / 2), ("1.5x", whole / 1.5), ("2ms", 2.0)):
        point = family.select(budget)
        kept = {axis: [kept_of(name) or 0 for (_, own), name in point.config.items() if own == axis] for axis in (HEADS, WIDTH)}
        blocks = list(zip(kept[HEADS], kept[WIDTH], strict=True))
        assert (
            table.predict("F32", blocks) < table.bound("F32", blocks) == pytest.approx(family.size(point)) and family.size(point) <= bound
        )
    assert "width128 F32" not in [choice.name for choice in family.space.decisions[1].choices]
    assert any("no less time" in reason for _, name, reason in family.coverage if name == "width128 F32")
    both = family.select(["2x", "70%"])
    assert family.size(both) <= whole / 2 and both.bytes_ <= 0.7 * family.original.bytes_
    frontier = [family.size(point) for point in family.frontier]
    assert frontier == sorted(frontier)
    with pytest.raises(BudgetError, match=r"smallest possible is 1\.000 ms"):
        family.select("0.9ms")


def test_evolution_keeps_to_milliseconds(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At high effort, where integers take longer than float32, so that only sizes save time."""
    device, dense = _device_of("onnxruntime"), made_table(model)
    modules = dense.modules | {(kind, size, "int4_sym"): 1.2 * ms for (kind, size, _), ms in dense.modules.items()}
    whole = dense.whole | {"int4_sym": 1.2 * dense.whole["F32"]}
    made = made_table(model, target="onnxruntime", device=device, modules=modules, whole=whole, margins=dict.fromkeys(whole, 1.0))
    made.write(tmp_path / "latency.json")
    runs = []

    def watched(space: Space, table: Table, *, budget: Budget, **given: object) -> list[Ranked]:
        ranked = evolve(space, table, budget=budget, **given)  # type: ignore[arg-type]
        runs.append((budget, ranked))
        return ranked

    monkeypatch.setattr(evolution, "evolve", watched)
    wishes = {"target": "onnxruntime", "formats": ("F32", "int4_sym"), "latency": tmp_path / "latency.json", "effort": "high"}
    family = fitted(model, text, tmp_path / "evolved.family", **wishes)
    assert len(runs) == finalists.NUM_REFINED
    for budget, ranked in runs:
        assert dict(budget.limits).keys() == {LATENCY} and all(budget.allows(family.space.costs(one.config)) for one in ranked)
        assert family.point(ranked[0].config).search is not None, "the best is a finalist"
    assert any(len(ranked) > 1 for _, ranked in runs)
    assert not any(point.refined for point in family.points)


@pytest.mark.parametrize("budget", ["2ms", "2x", "70%"])
@pytest.mark.parametrize("installed", [True, False])
def test_whose_milliseconds_a_budget_counts(
    fast: Family, family: Family, budget: str, installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family is chosen from on another machine, too, which need not have the runtime: that is told, in words and as JSON."""
    commands = {
        "show": ("show", str(fast.path), "--budget", budget),
        "export": ("export", str(fast.path), "--budget", budget, "--no-check", "--force", "-o", str(tmp_path / "exported")),
        "extract": ("extract", str(fast.path), "--budget", budget, "--force", "-o", str(tmp_path / "extracted")),
    }
    assert fast.notes_on(budget) == () and (budget != "70%" or family.notes_on(budget) == ())
    monkeypatch.setattr("anyfit.costs.latency._processor", lambda: "abacus")
    if not installed:
        monkeypatch.setattr(type(targets.get("transformers")), "stopwatch", _nothing_to_time_with)
    told = fast.notes_on(budget)
    assert len(told) == (budget != "70%")
    for arguments in commands.values():
        words, data = run_cli(*arguments), json.loads(run_cli(*arguments, "--json"))
        assert ("and not abacus" in " ".join(words.split())) == bool(told)
        assert [note for note in data["notes"] if "not of this device" in note] == list(told)


def _nothing_to_time_with(_: object) -> None:
    raise RuntimeMissingError("torch", "torch", "Measuring latency")


def test_a_table_says_the_target(model: Path, text: Path, tmp_path: Path) -> None:
    wishes = {"data": text, "recipe": "ziplm", "length": ASKED["length"], "segments": ASKED["segments"]}
    for name in ("transformers", "onnxruntime"):
        made_table(model, target=name, device=_device_of(name)).write(tmp_path / "latency.json")
        assert anyfit.plan(model, latency=tmp_path / "latency.json", **wishes).target == name  # type: ignore[arg-type]
    assert anyfit.plan(model, **wishes).target == "llama.cpp"  # type: ignore[arg-type]


def test_latencies_of_something_else_are_refused(model: Path, text: Path, family: Family, tmp_path: Path) -> None:
    table = made_table(model)
    others = {
        "another device": made_table(model, device=Device("abacus", 1, table.device.runtime, 1)),
        "measured for onnxruntime": made_table(model, target="onnxruntime", device=_device_of("onnxruntime")),
        "another network's: width 256 and not 512": made_table(model, shape=replace(table.shape, width=256)),
        "another network's: out 32000 and not 512": made_table(model, shape=replace(table.shape, out=32000)),
    }
    for said, other in others.items():
        other.write(tmp_path / "other.json")
        with pytest.raises(UserError, match=said):
            fitted(model, text, tmp_path / "no.family", latency=tmp_path / "other.json")
    table.write(tmp_path / "latency.json")
    with pytest.raises(UserError, match="decides about formats"):
        fitted(model, text, tmp_path / "no.family", recipe="gptq", latency=tmp_path / "latency.json")
    with pytest.raises(BudgetError, match="none was measured"):
        family.select("2ms")
    AutoModelForCausalLM.from_pretrained(model).to(torch.bfloat16).save_pretrained(tmp_path / "halves")
    tiny_tokenizer().save_pretrained(tmp_path / "halves")
    with pytest.raises(UserError, match="measured in F32, and not in BF16"):
        fitted(tmp_path / "halves", text, tmp_path / "no.family", latency=tmp_path / "latency.json")


def test_plans_take_every_budget(model: Path, text: Path, tmp_path: Path) -> None:
    made_table(model).write(tmp_path / "latency.json")
    asked = {**ASKED, "data": text, "latency": tmp_path / "latency.json"}
    assert anyfit.plan(model, budget=["1.5x", "macs <= 60%", "80%"], **asked).seconds > 0  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"smallest possible is 1\.000 ms"):
        anyfit.plan(model, budget="1000x", **asked)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Saturation is about rounding"):
        anyfit.plan(model, saturation=True, **asked)  # type: ignore[arg-type]


def test_parts_that_take_more_time_than_the_whole(model: Path, text: Path, tmp_path: Path) -> None:
    """Times are measured, so that they may: nothing is left for the rest then, and a network of no parts takes no time."""
    made_table(model, whole={"F32": 0.5}).write(tmp_path / "latency.json")
    family = fitted(model, text, tmp_path / "no-rest.family", latency=tmp_path / "latency.json")
    assert family.size(family.points[0]) == 0 < family.size(family.select("2x")) < family.size(family.select("1x"))


def test_tensors_of_several_types_are_not_rounded(text: Path, tmp_path: Path) -> None:
    """The config says halves, the file holds float32: the folder is as exact as the original."""
    folder = save_tiny(tmp_path / "mixed", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    family = fitted(folder, text, tmp_path / "mixed.family")
    made = family.export("70%", tmp_path / "small")
    assert all(check.passed for check in made.checks), made.checks
    assert family.point(family.space.largest()).plain_loss == 0


def test_what_the_network_has_no_place_for_is_told(model: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "more")
    save_file(load_file(folder / "model.safetensors") | {"spare": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    run = prepare(folder, data=text, **ASKED)  # type: ignore[arg-type]
    assert "spare" in [unit for unit, _, _ in run.coverage()]


def test_as_many_variants_as_a_large_network_has(tmp_path: Path) -> None:
    """The header of a file has room for them: 43 widths in five formats."""
    store = Store(tmp_path)
    (tmp_path / "variants").mkdir()
    names = [f"width{kept} {format_}" for kept in range(32, 44 * 32, 32) for format_ in MENU]
    with store.writing("model.layers.10.mlp.down_proj.weight", dict.fromkeys(names, (4096, 1))) as writing:
        for index, name in enumerate(names):
            writing.put(name, 0, Encoded(torch.full((4096, 1), index % 256, dtype=torch.uint8), torch.tensor([1 / 3], dtype=torch.float64)))
    assert store.variant("model.layers.10.mlp.down_proj.weight", names[200]).eq(200).all()


def test_matrices_that_are_stored_turned_have_their_own_sizes(text: Path, tmp_path: Path) -> None:
    """GPT-2 keeps (inputs, outputs): groups run along the inputs, and these are what is left of the channels."""
    pytest.importorskip("onnxruntime")
    wishes = {**ASKED, "target": "onnxruntime", "formats": ["F32", "int4_sym_g128"], "data": text}
    run = prepare(save_tiny(tmp_path / "gpt2", "gpt2"), **wishes)  # type: ignore[arg-type]
    grouped = [c.name for d in run.space.decisions if d.axis == WIDTH for c in d.choices if format_of(c.name) != "F32"]
    assert grouped and all((kept_of(name) or 1) % 128 == 0 for name in grouped)
    # Blocks of different sizes share fewer constants in their graph than those of the whole network.
    network, config = run.checkpoint.load(), Config({d.key: d.choices[index].name for index, d in enumerate(run.space.decisions[:4])})
    kept = {name: torch.arange(kept_of(config[name, structure.axis]) or 0) for name, structure in run.structures.items()}
    cut(network, run.architecture, kept_of_blocks(run.structures, kept, 2))
    predicted = run.space.bytes_(Config({**config, **{d.key: "F32" for d in run.space.decisions[4:]}}))
    assert _layout_of_cut(Cut(network, {}, Store(tmp_path).variant)).bytes_ <= predicted
    found = InMemory(network).weight("transformer.h.1.mlp.c_fc.weight")
    assert found is not None and found.transposed and found.shape == (kept_of(config["transformer.h.1.mlp.c_proj.weight", WIDTH]), 256)


def _device_of(target: str) -> Device:
    from anyfit.core.errors import RuntimeMissingError
    from anyfit.measuring import _stopwatch

    try:
        return Device.here(_stopwatch(target).runtime, 1)
    except RuntimeMissingError:
        pytest.skip(f"{target} is not installed")


def test_what_can_not_be_pruned_says_so(text: Path, model: Path, tmp_path: Path) -> None:
    biased = save_tiny(tmp_path / "qwen2", "qwen2")
    with pytest.raises(UserError, match=r"llama\.cpp can't run a smaller network of this one: .* only for networks like Llama"):
        fitted(biased, text, tmp_path / "no.family", target="llama.cpp")
    other = save_tiny(tmp_path / "bloom", "bloom")
    with pytest.raises(ModelError, match="can't be cut"):
        fitted(other, text, tmp_path / "no.family")


def test_a_budget_of_structure_on_a_family_of_formats(model: Path, text: Path, tmp_path: Path) -> None:
    run = prepare(model, target="transformers", data=text, length=LENGTH, segments=8)
    from anyfit.core.budget import Budget
    from anyfit.searchers.exact import require

    with pytest.raises(BudgetError, match="macs"):
        require(run.space, Budget.parse("1 MMACs"))


@pytest.fixture(scope="module")
def joint(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    pytest.importorskip("onnxruntime")
    output = tmp_path_factory.mktemp("families") / "joint.family"
    return fitted(model, text, output, target="onnxruntime", formats=["F32", "int8_sym", "int4_sym"])


@pytest.mark.parametrize("budget", ["40%", "macs <= 60%"])
def test_structure_and_formats_together(joint: Family, tmp_path: Path, budget: str) -> None:
    made = joint.export(budget, tmp_path / "small")
    assert all(check.passed for check in made.checks), made.checks
    assert made.bytes_ <= made.point.bytes_ and joint.budget(budget).allows(joint.space.costs(made.point.config))


@pytest.fixture(scope="module")
def gguf_family(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    output = tmp_path_factory.mktemp("families") / "gguf.family"
    return fitted(model, text, output, target="llama.cpp", formats=["Q8_0", "Q4_K"])


@pytest.mark.parametrize("budget", ["95%", "45%", "macs <= 50%", "15%"])
def test_a_pruned_network_as_gguf(gguf_family: Family, tmp_path: Path, budget: str) -> None:
    made = gguf_family.export(budget, tmp_path / "small.gguf")
    assert all(check.passed for check in made.checks), made.checks
    left_out = sum(kept_of(name) == 0 for name in made.point.config.values())
    assert made.point.bytes_ - 32768 * left_out - 1024 <= made.bytes_ == (tmp_path / "small.gguf").stat().st_size <= made.point.bytes_


def test_nothing_left_in_the_blocks_of_a_gguf(gguf_family: Family, tmp_path: Path) -> None:
    least = gguf_family.space.bytes_(gguf_family.space.smallest())
    made = gguf_family.export(f"{least}B", tmp_path / "nothing.gguf")
    assert all(check.passed for check in made.checks), made.checks


def test_rows_that_do_not_fill_a_block_are_no_choice(gguf_family: Family) -> None:
    names = [c.name for d in gguf_family.space.decisions if d.axis == WIDTH for c in d.choices if format_of(c.name) == "Q4_K"]
    assert names and all((kept_of(name) or 1) % 256 == 0 for name in names)
    assert ("width128 Q4_K", "row length 128 is not a multiple of 256") in {row[1:] for row in gguf_family.coverage}


def test_each_kind_of_choice_is_used(joint: Family) -> None:
    """Somewhere on the way down parts are left out, matrices are quantised, and both at once."""
    least, most = (joint.space.bytes_(config) for config in (joint.space.smallest(), joint.space.largest()))
    chosen = {name for share in (0.8, 0.5, 0.3, 0.1) for name in joint.select(f"{least + share * (most - least):.0f}B").config.values()}
    both = joint.select(["macs <= 60%", f"{least + 0.2 * (most - least):.0f}B"]).config.values()
    assert {format_of(name) for name in chosen} == {"F32", "int8_sym", "int4_sym"}
    assert any(format_of(name) != "F32" and (kept_of(name) or 0) < 512 and name.startswith("width") for name in both)


def test_what_is_left_is_rounded_for_what_is_left(joint: Family) -> None:
    """A smaller size in a format has no less error than the same size dense, and the original's size no more than any smaller."""
    for decision in joint.space.decisions:
        if decision.axis in (HEADS, WIDTH):
            errors = joint._store.errors(decision.unit.name)
            for choice in decision.choices:
                kept, dense = kept_of(choice.name), f"{choice.name.partition(' ')[0]} F32"
                assert errors[choice.name] >= 0.999 * errors[dense]
                full = max((c for c in decision.choices if format_of(c.name) == format_of(choice.name)), key=lambda c: kept_of(c.name) or 0)
                assert kept == kept_of(full.name) or errors[choice.name] > errors[full.name]


def test_only_settings_that_people_use_compete(joint: Family) -> None:
    names = {point.uniform for point in joint.points if point.uniform}
    # A network that keeps all in a format has two names, of its attentions and of its feed-forwards.
    assert {"heads2 int8_sym", "width512 int8_sym"} & names and {"heads2 int4_sym", "width512 int4_sym"} & names
    assert {name.partition(" ")[0] for name in names if " int" in name} <= {"heads2", "width512"}


def test_limits_that_oppose_each_other() -> None:
    """The lightest choice for one limit is the heaviest for the other: against every config there is."""
    from itertools import product

    from anyfit.core.budget import Budget
    from anyfit.core.space import Choice, Decision, Space
    from anyfit.core.units import Unit, Weight
    from anyfit.scores.table import Table
    from anyfit.searchers.exact import solve

    generator, decisions, errors = torch.Generator().manual_seed(0), [], {}
    for index in range(4):
        name = f"unit{index}"
        figures = [[int(x) for x in torch.randint(1, 90, (3,), generator=generator)] for _ in range(4)]
        choices = tuple(
            Choice(f"c{i}", size, size, {LATENCY: (100 - size) * 0.01 + 1e-3 * extra}) for i, (size, extra, _) in enumerate(figures)
        )
        decisions.append(Decision(Unit(name, (Weight(name, (1, 1), "q", name, 0),)), choices))
        errors[name] = {f"c{i}": float(score) for i, (_, _, score) in enumerate(figures)}
    space = Space(tuple(decisions), 0, 0, 4, {LATENCY: 0.0})
    table = Table(dict.fromkeys(errors, 1.0), errors)
    configs = [Config({d.key: c.name for d, c in zip(decisions, row, strict=True)}) for row in product(*(d.choices for d in decisions))]
    solved = 0
    for size, latency in product((120, 160, 200, 240), (1.2, 1.8, 2.4, 3.0)):
        budget = Budget((("bytes", float(size)), (LATENCY, latency)), "both")
        within = [config for config in configs if budget.allows(space.costs(config))]
        if not within:
            with pytest.raises(BudgetError, match="can't be met"):
                solve(space, table, budget)
            continue
        found = solve(space, table, budget)
        assert budget.allows(space.costs(found))
        assert table.predict(space, found) == pytest.approx(min(table.predict(space, config) for config in within))
        solved += 1
    assert solved >= 4
    for config in configs[::17]:  # limits that are just met
        budget = Budget(tuple((cost, space.costs(config)[cost]) for cost in ("bytes", LATENCY)), "both")
        assert table.predict(space, solve(space, table, budget)) <= table.predict(space, config) + 1e-9


def test_configs_travel_as_json(family: Family) -> None:
    config = family.select("60%").config
    assert Config.from_json(config.to_json()) == config
    assert set(config.to_json()) == {HEADS, WIDTH}
