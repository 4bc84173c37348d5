"""How much text is enough: one pass for all amounts, and a sentence that says what was found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from anyfit import api
from anyfit.architectures import architecture_of
from anyfit.calibration.collect import collect, collect_growing
from anyfit.calibration.data import Segments
from anyfit.calibration.saturation import Row, Saturation, saturate
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.units import Weight
from anyfit.devices import CPU, matrix_speed
from anyfit.progress import Silent
from anyfit.testing.models import VOCABULARY, tiny_model, tiny_text


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (20, 8), generator=torch.Generator().manual_seed(0))


def test_growing_statistics_are_those_of_each_amount(tokens: Tensor) -> None:
    model = tiny_model("llama")
    architecture = architecture_of(model)
    weights = list(architecture.weights(model))
    grown = list(collect_growing(model, architecture, weights, tokens, [3, 11, 20], progress=Silent()))
    for size, found in zip([3, 11, 20], grown, strict=True):
        alone = collect(model, architecture, weights, tokens[:size], progress=Silent())
        assert found.keys() == alone.keys()
        for name in found:
            assert found[name].count == alone[name].count == 8 * size
            # Batches differ in their sizes, and products may be of bfloat16 numbers.
            assert torch.allclose(found[name].hessian, alone[name].hessian, rtol=1e-2, atol=2e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_moments_are_those_of_the_inputs(tokens: Tensor) -> None:
    """Whatever the CPU multiplies them with; its settings are as before, also when something is raised."""
    model, before = tiny_model("llama"), torch.backends.mkldnn.matmul.fp32_precision
    architecture = architecture_of(model)
    weights = list(architecture.weights(model))
    (weight,) = (w for w in weights if w.role == "gate" and w.block == 0)
    found = collect(model, architecture, weights, tokens, progress=Silent())[weight.input]
    seen: list[Tensor] = []
    handle = model.get_submodule(architecture.hook_path(weight)).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    x = seen[0].double().flatten(0, 1)
    hessian = x.T @ x / len(x)
    assert (found.hessian - hessian).norm() < 0.01 * hessian.norm()
    assert torch.allclose(found.hessian.diagonal().double(), hessian.diagonal(), rtol=0.01)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(ZeroDivisionError), matrix_speed(CPU):
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_errors_are_of_the_outputs_on_held_out_text(tokens: Tensor) -> None:
    model = tiny_model("llama")
    architecture = architecture_of(model)
    weight = next(w for w in architecture.weights(model) if w.role == "down")
    matrix = dict(model.named_parameters())[weight.name].detach()
    seen: list[int] = []

    def stored(asked: Weight, given: Tensor, statistics: InputStatistics) -> Tensor:
        assert asked == weight
        seen.append(statistics.count)
        return given * (1 - 1 / statistics.count)

    text = Segments(tokens[:9], tokens[9:15], tokens[15:], "numbers")
    found = saturate(model, architecture, {weight: matrix}, text, stored, seed=0, progress=Silent())
    assert found is not None
    assert seen == [8 * size for size in (1, 2, 4, 9)]
    assert [(row.segments, row.tokens) for row in found.rows] == [(1, 8), (2, 16), (4, 32), (9, 72)]
    assert [row.error for row in found.rows] == pytest.approx([count**-2 for count in seen], rel=1e-3)
    assert (
        saturate(model, architecture, {weight: matrix}, Segments(tokens[:1], tokens, tokens, ""), stored, seed=0, progress=Silent()) is None
    )


def test_verdicts() -> None:
    def after(before: float, now: float) -> Saturation:
        return Saturation((Row(64, 6400, before), Row(128, 12800, now)))

    assert after(1, 0.988).verdict == "Enough text: going from 64 to 128 segments lowers the error on held-out text by 1.2 %."
    assert after(1, 1.05).verdict == "Enough text: going from 64 to 128 segments raises the error on held-out text by 5.0 %."
    assert "lowers the error on held-out text by 9.0 %. Try --segments 256." in after(1, 0.91).verdict
    assert after(0, 0).enough
    document = after(1, 0.91).to_json()
    assert document["enough"] is False and document["gain"] == pytest.approx(0.09)
    assert document["rows"][1] == {"segments": 128, "tokens": 12800, "error": 0.91}


def test_plan_says_whether_text_is_enough(tiny_llama_folder: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text(tiny_text(6000))
    wishes = {"data": notes, "formats": ["Q2_K", "Q8_0"], "length": 32}
    planned = api.plan(tiny_llama_folder, saturation=True, segments=16, **wishes)  # type: ignore[arg-type]
    assert planned.saturation is not None
    rows = planned.saturation.rows
    assert [row.segments for row in rows] == [2, 4, 8, 16]
    assert rows[-1].error < rows[0].error
    assert planned.to_json()["saturation"]["verdict"] == planned.saturation.verdict
    assert planned.saturation == api.plan(tiny_llama_folder, saturation=True, segments=16, **wishes).saturation  # type: ignore[arg-type]
    assert api.plan(tiny_llama_folder, segments=16, **wishes).to_json()["saturation"] is None  # type: ignore[arg-type]
    assert api.plan(tiny_llama_folder, saturation=True, segments=1, **wishes).saturation is None  # type: ignore[arg-type]
