"""The ONNX Runtime target: the suite for targets, exact sizes and numbers for networks of other forms, refusals."""

from __future__ import annotations

import builtins
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from anyfit.architectures.llama import LLAMA
from anyfit.checkpoint import Checkpoint
from anyfit.core.config import Config
from anyfit.core.errors import FamilyError, RuntimeMissingError
from anyfit.core.units import Weight
from anyfit.formats import formats
from anyfit.interface import LANGUAGE
from anyfit.structure.cutting import Kept, cut
from anyfit.targets import onnx_graph
from anyfit.targets.base import Cut
from anyfit.targets.onnx_graph import ExportError, Graph
from anyfit.targets.onnxruntime import TARGET
from anyfit.targets.onnxruntime_session import after, feed
from anyfit.testing.models import save_tiny, tiny_model
from anyfit.testing.targets import CHECKS, Trial

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

KINDS = {"llama, tied": {"tie_word_embeddings": True, "num_hidden_layers": 1}, "gpt2": {"num_hidden_layers": 1}, "bert": {}}
SLOW_KINDS = {kind: {} for kind in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neox", "opt", "phi3", "llama")}


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A trial of each kind, made once: exporting takes seconds."""

    @cache
    def made(kind: str) -> Trial:
        folder = tmp_path_factory.mktemp("tiny") / "model"
        return Trial.of(TARGET, save_tiny(folder, kind.partition(",")[0], **(KINDS | SLOW_KINDS)[kind]))

    return made


@pytest.mark.parametrize("check", CHECKS)
def test_the_suite_for_targets(trial, check, tmp_path):
    check(trial("llama, tied"), tmp_path)


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_KINDS)])
def test_every_kind_is_written_and_computes_what_torch_does(trial, kind, tmp_path):
    for seed in range(3):
        config = trial(kind).config(seed)
        assert trial(kind).write(tmp_path / str(seed), config) == trial(kind).space.bytes_(config)
        checks = trial(kind).check(tmp_path / str(seed), config)
        assert [check.name for check in checks] == ["audit", "values", "onnxruntime"]
        assert all(check.passed for check in checks), checks
        assert "skipped" not in checks[-1].detail


@pytest.mark.parametrize("name", [name for name in TARGET.formats if not formats.get(name).rounds])
def test_each_format_is_read_to_the_bit_by_products_and_by_lookups(trial, name, tmp_path):
    net = trial("llama, tied")
    config = Config({decision.key: name for decision in net.space.decisions})
    net.write(tmp_path / "folder", config)
    session = onnxruntime.InferenceSession(tmp_path / "folder" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["input_ids", "past_key_values.0.key", "past_key_values.0.value"]
    assert all(check.passed for check in net.check(tmp_path / "folder", config))


def test_tokens_after_others_are_what_they_are_in_the_whole_text(trial, tmp_path):
    """In pieces of any length, of several texts."""
    net = trial("llama, tied")
    config = Config({decision.key: "F32" for decision in net.space.decisions})
    net.write(tmp_path / "folder", config)
    session, model = onnxruntime.InferenceSession(tmp_path / "folder" / "model.onnx"), net.extract(config)
    tokens = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
    memory, start = {}, 0
    for stop in (7, 8, 9, 25, 40):
        given = session.run(None, feed(session, LANGUAGE, tokens[:, start:stop]) | memory)
        assert torch.allclose(torch.from_numpy(given[0]), expected[:, start:stop], atol=1e-4)
        memory, start = after(session, given), stop
    assert {value.shape for value in memory.values()} == {(3, 2, 40, 64)}


def test_blocks_of_different_sizes_remember_their_own(tmp_path):
    checkpoint = Checkpoint.open(save_tiny(tmp_path / "model", num_hidden_layers=3))
    source, model = checkpoint.source(list(LLAMA.weights(checkpoint.skeleton()))), checkpoint.load()
    kept = [Kept(torch.arange(groups), torch.arange(width)) for groups, width in ((0, 64), (1, 0), (2, 96))]
    made = Cut(cut(model, LLAMA, kept), {}, lambda *_: torch.empty(0))
    TARGET.write_cut(tmp_path / "small", source, made)
    checks = TARGET.check_cut(tmp_path / "small", source, made, torch.arange(96).reshape(2, 48))
    assert all(check.passed for check in checks) and "token by token" in checks[-1].detail, checks
    session = onnxruntime.InferenceSession(tmp_path / "small" / "model.onnx")
    heads = {item.name: item.shape[1] for item in session.get_inputs()[1:]}
    assert heads == {"past_key_values.1.key": 1, "past_key_values.1.value": 1, "past_key_values.2.key": 2, "past_key_values.2.value": 2}


def test_any_batch_and_length_is_run(trial, tmp_path):
    net = trial("llama, tied")
    config = Config({decision.key: "F32" for decision in net.space.decisions})
    net.write(tmp_path / "folder", config)
    session, model = onnxruntime.InferenceSession(tmp_path / "folder" / "model.onnx"), net.extract(config)
    for shape in ((1, 1), (3, 7), (1, 200)):
        tokens = torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(0))
        logits = session.run(["logits"], feed(session, LANGUAGE, tokens))[0]
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(logits), model(tokens).logits, atol=1e-4)


def test_the_graph_says_nothing_of_where_it_was_made(trial, tmp_path):
    net = trial("llama, tied")
    net.write(tmp_path / "folder", net.config(0))
    content = (tmp_path / "folder" / "model.onnx").read_bytes()
    assert b"site-packages" not in content and b"torch" not in content
    onnx.checker.check_model(onnx.load(tmp_path / "folder" / "model.onnx"))


def test_a_network_is_exported_once_and_stays_as_it_is(trial, same_random_state):
    source = trial("llama, tied").source
    before, graph = source.config.to_dict(), onnx_graph.of(source)
    again = Checkpoint.open(source.folder).source(trial("llama, tied").weights)
    assert onnx_graph.of(again) is graph
    assert onnx_graph.export(source.frame()).content == graph.content
    assert source.config.to_dict() == before
    assert graph.open == {name for name, _ in source.skeleton().named_parameters()}


def test_a_graph_of_another_size_than_the_familys_is_refused_before_writing(trial, tmp_path):
    net = trial("llama, tied")
    other = replace(net.space, fixed_bytes=net.space.fixed_bytes + 1)
    with pytest.raises(FamilyError, match="another size"):
        TARGET.write(tmp_path / "folder", net.source, other, net.config(0), net.variant)
    assert not (tmp_path / "folder").exists()


def test_a_network_that_cannot_be_exported_is_not_supported(trial, monkeypatch):
    def fails(_: object) -> Graph:
        raise ExportError("no such operator")

    source = trial("gpt2").source  # made before, as making it asks for the graph
    monkeypatch.setattr(onnx_graph, "_of", fails)
    assert "no such operator" in str(TARGET.supports(source))


def test_without_the_package_the_error_says_what_to_install(trial, monkeypatch):
    def missing(name: str, *rest: object, **more: object) -> object:
        if name.startswith("onnxscript"):
            raise ImportError(name=name)
        return imported(name, *rest, **more)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RuntimeMissingError, match=r"anyfit\[onnxruntime\]"):
        onnx_graph.export(tiny_model("llama"))


def test_a_row_length_that_a_group_does_not_divide_gets_smaller_groups_or_halves(trial):
    graph = onnx_graph.of(trial("llama, tied").source)
    name = "model.layers.0.mlp.down_proj.weight"
    for columns, wanted, expected in ((96, "int4_sym_g128", "int4_sym"), (64, "int2_asym_g128", "int2_asym"), (48, "int8_sym", "F16")):
        space = TARGET.space(trial("llama, tied").source, [Weight(name, (256, columns), "down", name, 0)], [wanted])
        (decision,) = space.decisions
        assert [choice.name for choice in decision.choices] == [expected]
        assert f"{expected} takes its place" in decision.refused[wanted]
    assert graph.uses(name)[0].kind == "MatMul"


def test_a_matrix_that_is_used_in_another_way_keeps_plain_numbers(trial):
    net = trial("llama, tied")
    norm = next(name for name in net.source.passthrough if name.endswith("norm.weight"))
    space = TARGET.space(net.source, [Weight(norm, (1, 256), "norm", None)], ["int8_sym"])
    assert "has an" in space.decisions[0].refused["int8_sym"]


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_what_travels_with_a_model_travels_with_the_graph(trial, tmp_path):
    net = trial("gpt2")
    net.write(tmp_path / "folder", net.config(0))
    assert files(tmp_path / "folder") >= {"model.onnx", "weights.safetensors", "config.json", "tokenizer.json"}
    assert "model.safetensors" not in files(tmp_path / "folder")
