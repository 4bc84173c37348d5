"""Weights and activations of 8 bits: codes are the runtime's, grids lose little, and what was measured is what a file computes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import anyfit
from anyfit.activations import HIGHEST, Dynamic, Static, round_inputs, roundings, unrounded
from anyfit.calibration.spread import Spread
from anyfit.core.config import Config
from anyfit.core.errors import UserError
from anyfit.costs.latency import Setting
from anyfit.distributed import ALONE
from anyfit.elastic.model import ElasticModel
from anyfit.family import Family
from anyfit.family.store import Decoder
from anyfit.formats import formats
from anyfit.formats.w8a8 import UNSEEN, StaticFormat
from anyfit.interface import TEXTS, interface_of
from anyfit.quantizers.base import Encoded
from anyfit.quantizers.inputs import with_inputs
from anyfit.targets import onnxruntime_session, targets
from anyfit.targets.onnx_file import ROUNDED, ROUNDING
from anyfit.targets.onnxruntime import TARGET
from anyfit.tasks import task_of
from anyfit.testing.models import save_tiny, tiny_model, tiny_text
from anyfit.testing.targets import Trial

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

LENGTH, NAMES = 24, ("int8_dynamic", "int8_static")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(kind: str, inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    """One node in ONNX Runtime."""
    helper = onnx.helper
    types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in inputs.items()}
    given = [helper.make_tensor_value_info(name, types[name], value.shape) for name, value in inputs.items()]
    graph = helper.make_graph([helper.make_node(kind, list(inputs), outputs)], "g", given, [onnx.ValueInfoProto(name=n) for n in outputs])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize("shift", [-9.0, -0.3, 0.0, 0.7, 9.0])
def test_a_dynamic_grid_is_the_runtimes_to_the_bit(shift: float) -> None:
    x = 3 * numbers(1, 40, 96) + shift
    codes, scale, zero = run("DynamicQuantizeLinear", {"x": x.numpy()}, ["codes", "scale", "zero"])
    expected = (codes.astype(np.float32) - zero) * scale
    assert np.array_equal(Dynamic()(x).numpy(), expected)
    assert len(np.unique(codes)) > 100
    assert not Dynamic()(torch.zeros(2, 3, 4)).any()


def test_a_static_grid_is_the_runtimes_to_the_bit() -> None:
    grid = Static(float(np.float32(0.037)), 93)
    x = torch.cat([5 * numbers(1, 40, 96), grid.scale * (torch.arange(96) + 0.5).expand(1, 1, 96)], 1)  # ties
    codes = run(
        "QuantizeLinear", {"x": x.numpy(), "scale": np.array(grid.scale, np.float32), "zero": np.array(grid.zero, np.uint8)}, ["codes"]
    )[0]
    assert np.array_equal(grid(x).numpy(), (codes.astype(np.float32) - grid.zero) * np.float32(grid.scale))
    assert {0, HIGHEST} <= set(codes.flatten().tolist()), "cut off at both ends"


def test_segments_have_grids_of_their_own() -> None:
    x = numbers(3, 7, 16) * torch.tensor([1.0, 10, 0.1])[:, None, None]
    kept = x.clone()
    assert torch.equal(Dynamic()(x), torch.cat([Dynamic()(segment[None]) for segment in x]))
    assert torch.equal(x, kept)


def test_a_module_rounds_in_one_way_at_a_time() -> None:
    linear, x, grid = torch.nn.Linear(8, 4), numbers(2, 8), Static(0.5, 128)
    plain = linear(x)
    for rounding in (Dynamic(), grid):
        round_inputs(linear, rounding)
    assert torch.equal(linear(x), torch.nn.functional.linear(grid(x), linear.weight, linear.bias)) and roundings(linear) == {"": grid}
    with unrounded(linear):
        assert torch.equal(linear(x), plain)
    assert roundings(linear) == {"": grid}
    round_inputs(linear, None)
    assert torch.equal(linear(x), plain)


def seen(x: Tensor) -> Spread:
    spread = Spread()
    spread.add(x, x.flatten(0, -2))
    return spread


@pytest.mark.parametrize("kind", ["normal", "outliers", "positive", "negative"])
def test_a_grid_loses_what_it_says_and_no_more_than_the_whole_range(kind: str) -> None:
    x = numbers(20, 50, 64)
    x = {"normal": x, "outliers": torch.where(x.abs() > 3.7, 40 * x, x), "positive": x.clamp_min(0), "negative": -x.abs() - 2}[kind]
    grid, error = seen(x).grid
    low, high = min(float(x.min()), 0), max(float(x.max()), 0)
    whole = Static((high - low) / HIGHEST, round(-low / (high - low) * HIGHEST))
    measured, widest = (float((x - own(x)).square().mean()) for own in (grid, whole))
    assert measured == pytest.approx(error, rel=0.1)
    assert measured <= 1.001 * widest and (kind != "normal" or measured < 0.98 * widest)


def test_what_was_seen_adds_up_in_any_order() -> None:
    x = numbers(8, 5, 16).mul_(numbers(8, 1, 1, seed=1))
    whole, parts = seen(x), Spread()
    for part in (x[5:], x[:3], x[3:5]):
        parts.add(part, part.flatten(0, 1))
    parts.add_up(ALONE)
    assert torch.equal(whole.counts, parts.counts) and whole.grid == parts.grid and whole.dynamic_error == parts.dynamic_error


@pytest.mark.parametrize("name", NAMES)
def test_the_error_of_rounded_inputs_is_that_of_outputs(name: str) -> None:
    format_, x, weight = formats.get(name), numbers(30, 20, 64), 0.1 * numbers(12, 64, seed=2)
    data = format_.encode(weight, torch.ones(64))  # type: ignore[attr-defined]
    spread = seen(x)
    made = with_inputs(format_, Encoded(data, torch.zeros(12, dtype=torch.float64)), spread)
    values, rounding = format_.decode(made.data), format_.inputs(made.data)
    assert rounding is not None
    measured = ((rounding(x) - x) @ values.T).square().flatten(0, 1).mean(0)
    assert torch.allclose(measured.double(), made.errors, rtol=0.25)
    assert torch.equal(values, format_.decode(data)) and (rounding == spread.grid[0] or name == "int8_dynamic")


def test_rows_keep_the_grid_of_their_matrix() -> None:
    format_ = formats.get("int8_static")
    assert isinstance(format_, StaticFormat)
    data = format_.encode(numbers(9, 3), torch.ones(3))
    assert format_.inputs(data) == UNSEEN
    grid = Static(float(np.float32(0.123)), 7)
    changed = format_.with_grid(data, grid)
    for which in (slice(2, 4), slice(0, 0), torch.tensor([8, 1])):
        part = format_.rows(changed, which)
        assert format_.inputs(part) == grid and torch.equal(format_.decode(part), format_.decode(data)[which])
    assert format_.inputs(data) == UNSEEN, "the given one is as it was"


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.jsonl"
    path.write_text("\n".join(json.dumps({"text": tiny_text(1 + seed % 7, seed=seed)}) for seed in range(120)), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["gptq", "ziplm"])
def family(request: pytest.FixtureRequest, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Of formats, and of sizes and formats."""
    folder = tmp_path_factory.mktemp("tiny")
    wishes = {"recipe": request.param, "length": LENGTH, "segments": 12, "effort": "low", "formats": ("F32", *NAMES)}
    return anyfit.fit(save_tiny(folder / "model", "bert"), output=folder / "tiny.family", data=sentences, target="onnxruntime", **wishes)


def configs(family: Family) -> list[Config]:
    """Measured ones that round: the smallest, the largest, and one between; each format everywhere, where these are settings."""
    rounds = [p for p in family.points if any(name in choice for choice in p.config.chosen.values() for name in NAMES)]
    some = (rounds[0], rounds[len(rounds) // 2], rounds[-1])
    return list(dict.fromkeys(p.config for p in (*some, *(p for p in rounds if p.uniform in NAMES))))


def test_what_is_measured_rounds_as_what_is_extracted_and_as_the_file_does(family: Family, tmp_path: Path) -> None:
    text = family.text()["report"]
    reference = task_of(family.source.config).reference(family.extract(family.space.largest()), text)
    for index, config in enumerate(configs(family)):
        point, model = family.point(config), family.extract(config)
        assert point.report is not None
        assert reference.loss(model) == pytest.approx(point.report.loss, rel=0.02, abs=1e-7)
        made = family.export(point.uniform or f"{point.bytes_}B", tmp_path / f"{index}")
        assert all(check.passed for check in made.checks), made.checks
        if made.point.config == config and roundings(model):
            assert "products of rounded inputs" in made.checks[-1].detail
            with unrounded(model):
                assert reference.loss(model) != pytest.approx(point.report.loss, rel=1e-4)
            run = lambda segments, path=made.path: onnxruntime_session.outputs(path, TEXTS, segments)  # noqa: E731
            assert reference.loss(run) == pytest.approx(point.report.loss, rel=0.05, abs=1e-7)


def test_a_switched_network_rounds_as_the_extracted_one(family: Family) -> None:
    if family.pruned:
        pytest.skip("there its parts are zeros, and sums have another order")
    elastic = ElasticModel(
        family.extract(family.space.largest()), family.space, Decoder(family._store.variant, targets.get(family.target), family.source)
    )
    text = family.text()["search"][:4]
    for config in (*configs(family), family.space.largest()):
        assert torch.equal(TEXTS(elastic.set(config), text), TEXTS(family.extract(config), text))


def test_another_grid_in_the_file_is_noticed(tmp_path: Path) -> None:
    """By the audit of numbers, before anything runs."""
    net = Trial.of(TARGET, save_tiny(tmp_path / "model", "bert", num_hidden_layers=1), ("F32", "int8_static"))
    config = net.space.smallest()
    net.write(tmp_path / "file", config)
    assert all(check.passed for check in net.check(tmp_path / "file", config))
    format_, key = formats.get("int8_static"), ("encoder.layer.0.output.dense.weight", "int8_static")
    assert isinstance(format_, StaticFormat)
    net._variants[key] = format_.with_grid(net._variants[key], Static(0.25, 3))
    failed = [check for check in net.check(tmp_path / "file", config) if not check.passed]
    assert failed and failed[0].name == "values" and "another grid" in failed[0].detail


def test_pictures_are_rounded_too(tmp_path: Path) -> None:
    """The whole of each, the classifier's one position included."""
    net = Trial.of(TARGET, save_tiny(tmp_path / "model", "vit"), NAMES)
    interface, segments = interface_of(net.original.config), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        config = net.space.uniform(name)
        assert net.write(tmp_path / name, config) == net.space.bytes_(config)
        model = net.extract(config)
        for weight in net.weights:
            rounding = formats.get(name).inputs(net.variant(weight.name, name))
            round_inputs(model.get_submodule(weight.name.removesuffix(".weight")), rounding)
        with torch.no_grad():
            expected = interface(model, segments)
        found = onnxruntime_session.outputs(tmp_path / name, interface, segments)
        assert torch.allclose(found, expected, atol=0.02 * float(expected.abs().max())), name
        with unrounded(model), torch.no_grad():
            assert not torch.allclose(interface(model, segments), expected, atol=1e-4)


def test_a_stopwatch_times_what_is_written(tmp_path: Path) -> None:
    stopwatch, setting, model = TARGET.stopwatch(), Setting(2, 16), tiny_model("bert", num_hidden_layers=1)
    for name, rounding in zip(ROUNDED, ROUNDING, strict=True):
        (folder := tmp_path / name).mkdir()
        (states, *_) = stopwatch.ready(model, name, setting, 1, folder)()  # type: ignore[misc]
        assert np.isfinite(states.numpy()).all() and states.shape() == [2, 16, 256]
        kinds = Counter(node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)
        assert kinds["MatMulIntegerToFloat"] == kinds[rounding] == 6
    with pytest.raises(UserError, match="encoders only"):
        stopwatch.ready(tiny_model("llama", num_hidden_layers=1), ROUNDED[0], setting, 1, tmp_path)


def test_who_cannot_round_says_so(tmp_path: Path, sentences: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    refused = {d.unit.name: d.refused for d in Trial.of(TARGET, folder, NAMES).space.decisions}
    assert "looked up" in refused["model.embed_tokens.weight"]["int8_static"]
    for name in NAMES:
        reason = refused["model.layers.0.self_attn.q_proj.weight"][name]
        assert "encoders only" in reason and "int8_sym takes its place" in reason
    with pytest.raises(UserError, match="doesn't load the format int8_dynamic"):
        anyfit.fit(folder, output=tmp_path / "x.family", data=sentences, target="transformers", formats=["int8_dynamic"])
