"""Additive codebooks: bytes, the fit of one matrix against independent computations, and families that transformers loads."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import anyfit
from anyfit import estimates, finalists, training
from anyfit.api import prepare
from anyfit.architectures import architecture_of
from anyfit.calibration.statistics import InputStatistics
from anyfit.checkpoint import Checkpoint
from anyfit.core.config import Config
from anyfit.core.errors import UserError
from anyfit.family import Family
from anyfit.family.store import Store
from anyfit.formats import AQLM_SCHEMES, formats
from anyfit.formats.aqlm import Additive, AdditiveFormat
from anyfit.formats.base import SPAN
from anyfit.progress import Silent
from anyfit.quantizers import aqlm, quantizers
from anyfit.recipes import recipes
from anyfit.recipes.base import Tuning
from anyfit.targets.aqlm import LAYOUTS
from anyfit.targets.transformers import TARGET
from anyfit.tasks.language import Reference
from anyfit.testing.models import save_tiny, tiny_model, tiny_text
from anyfit.testing.targets import CHECKS, Trial
from anyfit.trainers import loop, pv
from anyfit.tuning import moving
from anyfit.tuning.coded import Matrix, Stored, Summed, Tuned
from anyfit.tuning.refining import Refinery

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
}
"""All of one shape, as aqlm compiles its kernel for each."""
MISSING = LAYOUTS[0].lacks_runtime()
needs_aqlm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def additive(name: str) -> AdditiveFormat:
    format_ = formats.get(name)
    assert isinstance(format_, AdditiveFormat)
    return format_


def moments(columns: int) -> Tensor:
    """Of inputs with correlations and channels of different sizes."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(2 * columns, columns, generator=generator) @ mixing * torch.randn(columns, generator=generator).exp()
    return x.T @ x / len(x)


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def fit(name: str, rows: int = 96, columns: int = 128) -> aqlm.Fit:
    return aqlm.Fit(additive(name), weights(rows, columns), moments(columns))


def any_parts(format_: AdditiveFormat, rows: int, columns: int) -> Additive:
    rng = torch.Generator().manual_seed(3)
    return Additive(
        codebooks=torch.randn(format_.num_codebooks, 256, format_.group, generator=rng).half(),
        scales=torch.randn(rows, generator=rng).half(),
        codes=torch.randint(256, (rows, columns // format_.group, format_.num_codebooks), generator=rng, dtype=torch.uint8),
    )


@pytest.mark.parametrize("name", AQLM_SCHEMES)
def test_bytes_hold_codebooks_then_rows(name: str) -> None:
    format_, (rows, columns) = additive(name), (5, 48)
    parts = any_parts(format_, rows, columns)
    data = format_.pack(parts)
    flat, row_bytes = data.numpy().reshape(-1), format_.row_bytes(columns)
    size = format_.num_codebooks * 256 * format_.group * 2
    books = flat[:size].view(np.float16).reshape(format_.num_codebooks, 256, format_.group)
    own = flat[data.numel() - rows * row_bytes :].reshape(rows, row_bytes)
    scales, codes = own[:, :2].copy().view(np.float16)[:, 0], own[:, 2:].reshape(rows, -1, format_.num_codebooks)
    for row, group in itertools.product(range(rows), range(columns // format_.group)):
        total = sum(books[book, codes[row, group, book]].astype(np.float32) for book in range(format_.num_codebooks))
        found = format_.decode(data)[row, group * format_.group : (group + 1) * format_.group]
        assert np.array_equal(found.numpy(), total * np.float32(scales[row]))
    assert format_.bytes_((rows, columns)) == size + own.size
    again = format_.read(data)
    assert all(torch.equal(getattr(again, part), getattr(parts, part)) for part in ("codebooks", "scales", "codes"))


def test_matrices_that_codebooks_would_make_larger_are_refused() -> None:
    assert "no fewer bytes" in str(additive("aqlm_2x8g8").refuses((64, 64)))
    assert additive("aqlm_1x8g8").refuses((64, 64)) is None
    assert "multiple of 8" in str(additive("aqlm_1x8g8").refuses((512, 516)))


@pytest.mark.parametrize("name", AQLM_SCHEMES)
def test_every_step_of_a_fit_lowers_the_error(name: str) -> None:
    found = fit(name)
    errors = [found.error()]
    for _ in range(3):
        for step in (found.fit_codebooks, found.choose_codes, found.fit_scales):
            step()
            errors.append(found.error())
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.8 * errors[0]
    stored = found.stored()
    difference = found.weight - stored.values
    assert float((difference @ found.hessian * difference).sum()) == pytest.approx(found.error(), rel=1e-4)


@pytest.mark.parametrize("name", ["aqlm_1x8g4", "aqlm_1x8g8"])
def test_with_one_codebook_codes_are_the_nearest_in_the_metric(name: str) -> None:
    group = additive(name).group
    found = fit(name, 40, group)
    found.choose_codes()
    entries = found.scales[:, None, None] * found.codebooks[0]
    difference = found.weight[:, None] - entries
    best = torch.einsum("reg,gh,reh->re", difference, found.hessian, difference)
    chosen = best.gather(1, found.codes[:, 0].long())[:, 0]
    assert torch.allclose(chosen, best.amin(1), rtol=1e-4)


def test_codes_are_the_best_of_their_group_once_no_group_changes() -> None:
    """Across spans, too, whose groups push their errors on to each other."""
    found = fit("aqlm_1x8g8", 24, SPAN + 16)
    for _ in range(50):
        before = found.codes.clone()
        found.choose_codes()
        if torch.equal(before, found.codes):
            break
    assert torch.equal(before, found.codes)
    least = found.error()
    for row, group in ((0, 0), (11, 31), (23, 32), (3, 33), (17, 7)):
        kept = int(found.codes[row, group, 0])
        tried = []
        for code in range(256):
            found.codes[row, group, 0] = code
            tried.append(found.error())
        found.codes[row, group, 0] = kept
        assert least <= min(tried) * (1 + 1e-5)


def test_a_beam_is_no_worse_than_greedy_and_a_full_one_is_exhaustive() -> None:
    found = fit("aqlm_2x8g8", 700, 8)
    given, errors = found.codes.clone(), {}
    for width in (1, 8, 256):
        found.codes = given.clone()
        found.choose_codes(width)
        difference = found.weight - found.values()
        errors[width] = (difference @ found.hessian * difference).sum(1)
    assert (errors[8] <= errors[1] * (1 + 1e-5)).all() and errors[8].sum() < errors[1].sum()
    for row in range(4):
        pairs = found.scales[row] * (found.codebooks[0][:, None] + found.codebooks[1][None]).flatten(0, 1)
        difference = found.weight[row] - pairs
        assert float(errors[256][row]) == pytest.approx(float((difference @ found.hessian * difference).sum(1).min()), rel=1e-3, abs=1e-9)


def test_codebooks_come_to_their_least_squares_and_scales_to_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aqlm, "_LEAST_SQUARES_STEPS", 300)
    found = fit("aqlm_2x8g8", 24, 16)
    found.codes = torch.randint(6, found.codes.shape, generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    found.fit_scales()
    found.fit_codebooks()
    root = torch.linalg.cholesky(found.hessian.double())
    design = torch.zeros(24, 16, 2, 256, 8, dtype=torch.float64)
    for row, column, book in itertools.product(range(24), range(16), range(2)):
        design[row, column, book, int(found.codes[row, column // 8, book]), column % 8] = found.scales[row].double()
    design = torch.einsum("rcx,cd->rdx", design.flatten(2), root).flatten(0, 1)
    wanted = (found.weight.double() @ root).flatten()
    best = torch.linalg.lstsq(design, wanted.unsqueeze(1), driver="gelsd").solution
    least = float((design @ best - wanted.unsqueeze(1)).square().sum())
    assert least > 0 and found.error() == pytest.approx(least, rel=1e-3)
    found = fit("aqlm_1x8g8")
    kept, least = found.scales.clone(), found.error()
    for factor in (0.99, 1.01):
        found.scales = kept * factor
        assert found.error() > least


def test_correlations_are_made_use_of() -> None:
    statistics, weight, format_ = InputStatistics(moments(128), 256), weights(128, 128), formats.get("aqlm_1x8g4")
    errors = {}
    for name in ("rtn", "gptq"):
        quantizer = quantizers.get(name)
        errors[name] = quantizer.encode(weight, quantizer.prepare(statistics), format_).error
    assert errors["gptq"] < 0.8 * errors["rtn"]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial.of(TARGET, save_tiny(tmp_path_factory.mktemp("aqlm") / "model", **SMALL), ("aqlm_1x8g4", "F16", "F32"))


@needs_aqlm
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(trial: Trial, check: Any, tmp_path: Path) -> None:
    check(trial, tmp_path)


def test_a_folder_has_the_layout_of_aqlm(trial: Trial, tmp_path: Path) -> None:
    weight = next(w for w in trial.weights if w.name.endswith("layers.0.mlp.up_proj.weight"))
    config = Config({d.key: "aqlm_1x8g4" if d.unit.weights == (weight,) else "F16" for d in trial.space.decisions})
    assert trial.write(tmp_path / "folder", config) == trial.space.bytes_(config)
    tensors, path = load_file(tmp_path / "folder" / "model.safetensors"), weight.name.removesuffix(".weight")
    codes, books, scales = (tensors[f"{path}.{part}"] for part in ("codes", "codebooks", "scales"))
    rows, columns = weight.shape
    assert codes.shape == (rows, columns // 4, 1) and codes.dtype == torch.int8
    assert books.shape == (1, 256, 1, 4) and scales.shape == (rows, 1, 1, 1)
    # as a dictionary would read it: nothing of ours but the file
    values = torch.tensor([[[float(n) for n in books[0, int(c) % 256, 0]] for c in row[:, 0]] for row in codes[:3]])
    expected = trial.extract(config).get_parameter(weight.name)[:3]
    assert torch.equal(values.flatten(1) * scales[:3].float().view(-1, 1), expected)
    settings = json.loads((tmp_path / "folder" / "config.json").read_text())
    told = settings["quantization_config"]
    assert (told["num_codebooks"], told["nbits_per_codebook"], told["in_group_size"], told["out_group_size"]) == (1, 8, 4, 1)
    assert path not in told["linear_weights_not_to_quantize"] and "lm_head" in told["linear_weights_not_to_quantize"]
    plain = Config({d.key: "F16" for d in trial.space.decisions})
    trial.write(tmp_path / "plain", plain)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_what_cannot_be_in_codebooks_says_why(tmp_path: Path) -> None:
    def refused(kind: str, **overrides: Any) -> dict[str, str]:
        checkpoint = Checkpoint.open(save_tiny(tmp_path / f"{kind} {len(overrides)}", kind, **overrides))
        found = list(architecture_of(checkpoint.skeleton()).weights(checkpoint.skeleton()))
        space = TARGET.space(checkpoint.source(found), found, ("aqlm_1x8g4", "F16"))
        return {d.unit.name: d.refused.get("aqlm_1x8g4", "") for d in space.decisions}

    assert "this is a Embedding" in refused("llama")["model.embed_tokens.weight"]
    assert refused("llama")["lm_head.weight"] == ""
    assert "this is a Conv1D; F16 takes its place" in refused("gpt2")["transformer.h.0.attn.c_attn.weight"]
    assert "FalconLinear has a forward of its own" in refused("falcon")["transformer.h.0.mlp.dense_h_to_4h.weight"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fit")
    (folder / "notes.txt").write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    tiny = save_tiny(folder / "tiny", **SMALL)
    return {"model": tiny, "data": folder / "notes.txt", "target": "transformers", "length": 32, "segments": 8}


@pytest.mark.parametrize("names", [("aqlm_2x8g8", "int4_sym"), ("aqlm_2x8g8", "aqlm_1x8g4", "F16")])
def test_formats_that_no_folder_has_together_are_refused_before_any_work(names: tuple[str, ...], asked: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"No folder that transformers loads can have aqlm_2x8g8 and .*--formats aqlm_2x8g8,F16"):
        anyfit.plan(formats=names, **asked)
    with pytest.raises(UserError, match="nothing to train"):
        prepare(formats=("F16", "BF16"), recipe="llm-qfa", **asked)


def test_a_family_in_codebooks_and_plain_tensors(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = anyfit.fit(output=tmp_path / "tiny.family", formats=("aqlm_1x8g4", "F16"), **asked)
    assert {"aqlm_1x8g4", "F16"} == set(family.space.formats())
    mixed = next(p for p in family.frontier if len(set(p.config.formats.values())) == 2)
    export = family.export(f"{mixed.bytes_} B", tmp_path / "folder")
    assert export.bytes_ == (tmp_path / "folder" / "model.safetensors").stat().st_size and all(check.passed for check in export.checks)
    assert "NUMBA_NUM_THREADS=1" in (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    extracted = Family.open(tmp_path / "tiny.family").extract(f"{mixed.bytes_} B")
    weight = next(w for d in family.space.decisions for w in d.unit.weights if mixed.config[d.key] == "aqlm_1x8g4")
    data = family.variants(mixed.config)(weight.name, "aqlm_1x8g4")
    assert torch.equal(extracted.get_parameter(weight.name), formats.get("aqlm_1x8g4").decode(data))

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("anyfit.family.store.Writing.close", stopped)
        with pytest.raises(KeyboardInterrupt):
            anyfit.fit(output=tmp_path / "killed.family", formats=("aqlm_1x8g4", "F16"), **asked)
    assert anyfit.fit(output=tmp_path / "killed.family", formats=("aqlm_1x8g4", "F16"), **asked).digest == family.digest


def test_a_family_is_tuned(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(*args: Any, **more: Any) -> Tuned:
        return replace(tune(*args, **more), before=1.0, after=0.5)

    tune = pv.tune
    monkeypatch.setattr(pv, "tune", halved)
    monkeypatch.setitem(recipes.get("pv-tuning").__dict__, "training", Tuning(pv.Settings(num_steps=2)))
    monkeypatch.setattr(finalists, "NUM_FINALISTS", 2)
    family = anyfit.fit(output=tmp_path / "tuned.family", formats=("aqlm_1x8g8", "F16"), recipe="pv-tuning", **asked)
    assert any(note.startswith("aqlm_1x8g8: trained, KL") for note in family.manifest.notes)
    store, table = Store(family.path), family.manifest.table
    for decision in family.space.decisions:
        (weight,) = decision.unit.weights
        errors, found = store.errors(weight.name), table.errors[decision.unit.name]
        assert found["F16"] == errors["F16"]
        if "aqlm_1x8g8" in found:
            share = 1 if weight.block is None else 0.5  # errors shrink as the loss does
            assert found["aqlm_1x8g8"] == pytest.approx(share * errors["aqlm_1x8g8"])


def test_a_family_is_trained_at_once(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebooks and scales move, codes don't; what is extracted is what was stored."""
    monkeypatch.setattr(training.Gain, "kept", True)
    recipe = recipes.get("llm-qfa")
    assert recipe.training is not None
    few = replace(recipe.training, settings=loop.Settings(num_steps=4, batch_size=2, rank=2))
    monkeypatch.setitem(recipe.__dict__, "training", few)
    monkeypatch.setattr(finalists, "NUM_FINALISTS", 2)
    given = {"formats": ("aqlm_1x8g8", "F16"), **asked}
    before = anyfit.fit(output=tmp_path / "plain.family", **given)
    family = anyfit.fit(output=tmp_path / "trained.family", recipe="llm-qfa", **given)
    assert any(note.startswith("aqlm_1x8g8: trained, KL") for note in family.manifest.notes)
    config = family.space.uniform("aqlm_1x8g8")
    extracted = family.extract(config)
    for decision in family.space.decisions:
        (weight,) = decision.unit.weights
        if weight.block is None or config[decision.key] != "aqlm_1x8g8":
            continue
        data, own = (one.variants(config)(weight.name, "aqlm_1x8g8") for one in (before, family))
        was, now = (additive("aqlm_1x8g8").read(stored) for stored in (data, own))
        assert torch.equal(was.codes, now.codes) and not torch.equal(was.codebooks, now.codebooks)
        assert torch.equal(extracted.get_parameter(weight.name), now.values)


def test_memory_is_planned_for_whole_matrices(asked: dict[str, Any]) -> None:
    codebooks, integers = (estimates._whole_matrices(prepare(formats=names, **asked)) for names in (("aqlm_1x8g4", "F16"), ("int4_sym",)))
    assert integers == 0 and codebooks >= aqlm.BYTES_A_NUMBER * 128 * 128


def test_refining_solves_codebooks_again_for_what_arrives() -> None:
    model = tiny_model("llama", **{**SMALL, "num_hidden_layers": 2}).requires_grad_(False)
    tokens = torch.randint(256, (16, 24), generator=torch.Generator().manual_seed(1))
    architecture, format_, stored = architecture_of(model), additive("aqlm_1x8g8"), copy.deepcopy(model)
    matrices = []
    for weight in architecture.weights(model):
        if weight.block is not None:
            data = aqlm.encode(format_, model.get_parameter(weight.name).float(), torch.eye(weight.shape[1]))
            matrices.append(Stored(weight, format_, data, None))
            stored.get_parameter(weight.name).copy_(matrices[-1].values())
    text = Reference.of(model, tokens)
    refinery = Refinery(model, architecture, quantizers.get("gptq"), calibration=tokens, held_out=text)
    found = refinery.refine(stored, matrices, Silent())
    assert found.after < found.before and found.data.keys() == {entry.weight.name for entry in matrices}
    name, data = next(iter(found.data.items()))
    assert torch.equal(stored.get_parameter(name), format_.decode(data))


FEW = pv.Settings(num_steps=12, code_rate=0.1, rate=1e-2)


@pytest.mark.parametrize("name", ["aqlm_1x8g4", "aqlm_2x8g8"])
def test_pv_tuning_moves_codes_codebooks_and_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS", -1.0)
    model = tiny_model("llama", **SMALL, vocab_size=256).requires_grad_(False)
    tokens = torch.randint(256, (16, 24), generator=torch.Generator().manual_seed(1))
    text, given = [Reference.of(model, tokens)] * 2, {}
    for weight in architecture_of(model).weights(model):
        if weight.block is not None and additive(name).refuses(weight.shape) is None:
            values = model.get_parameter(weight.name).float().flip(0)
            coded = Summed(additive(name), additive(name).read(aqlm.encode(additive(name), values, torch.eye(weight.shape[1]))))
            given[weight.name] = Matrix(coded, values, torch.arange(len(values)).flip(0))
    kept = list[dict[str, Tensor]]()
    found = pv.tune(model, given, *text, settings=FEW, progress=Silent(), keep=kept.append)
    without_codes = pv.tune(model, given, *text, settings=replace(FEW, share=1e-9), progress=Silent())
    assert found.after < without_codes.after < 0.9 * found.before
    for key, entry in found.coded.items():
        assert isinstance(entry, Summed)
        before, after = given[key].coded.parts, additive(name).read(entry.data)
        assert torch.equal(additive(name).decode(entry.data), entry.parts.values), "what is tuned is what is stored"
        assert all(not torch.equal(getattr(before, part), getattr(after, part)) for part in ("codes", "codebooks", "scales"))
    for checkpoint in ({}, kept[4]):
        again = pv.tune(model, given, *text, settings=FEW, progress=Silent(), checkpoint=checkpoint)
        assert all(torch.equal(entry.data, again.coded[key].data) for key, entry in found.coded.items())


@pytest.mark.parametrize(("num_steps", "pace"), [(12, 1.0), (150, 1.0), (450, 1 / 3)])
def test_codes_of_codebooks_go_as_far_in_long_runs_as_in_short_ones(num_steps: int, pace: float) -> None:
    """The buffer's step, in which nothing else counts: in the first, each weight's by its gradient's sign."""
    matrix = Matrix(Summed(additive("aqlm_1x8g8"), any_parts(additive("aqlm_1x8g8"), 4, 32)), torch.zeros(4, 32))
    subject = moving.subject(matrix, 1.0, num_steps)
    before = subject.buffer.clone()
    subject.move(torch.ones(4, 32), {"continuous": 0.0, "codes": 0.1}, 1)
    assert float((subject.buffer - before).norm()) == pytest.approx(0.1 * pace * float(before.norm()), rel=1e-4)


def test_gradients_of_codebooks_and_scales_are_those_of_the_values() -> None:
    parts = any_parts(additive("aqlm_2x8g8"), 6, 32)
    matrix = Matrix(Summed(additive("aqlm_2x8g8"), parts), torch.zeros(6, 32))
    subject = moving.SummedSubject(matrix, FEW.share)
    gradient = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    books = subject.codebooks.clone().requires_grad_()
    entries = torch.stack([books[book][parts.codes[..., book].long()] for book in range(2)]).sum(0)
    ((entries.flatten(1) * parts.scales.float().unsqueeze(1)) * gradient).sum().backward()
    assert books.grad is not None
    seen: dict[str, Tensor] = {}
    subject._adam_step = lambda name, by, rate, step: seen.update({name: by})  # type: ignore[method-assign]
    subject._move_rest(gradient, 1.0, 1)
    assert torch.allclose(seen["codebooks"], books.grad, atol=1e-5)
    assert torch.allclose(seen["scales"], (gradient * subject.values()).sum(1), atol=1e-5)
