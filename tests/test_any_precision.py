"""Codebooks of rows: the best clusters, nested sizes, one stored matrix for all of them, and folders that are read at any size."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import anyfit
import anyfit.transformers_plugin
from anyfit import encoding, finalists, pipeline
from anyfit.api import prepare
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.errors import UserError
from anyfit.family.family import Family
from anyfit.family.store import Store
from anyfit.formats import TABLE_BITS, formats
from anyfit.formats.fitting_tables import SEED, entries, fit_tables
from anyfit.formats.nested import held
from anyfit.formats.table import TableFormat, looked_up
from anyfit.network import quiet
from anyfit.quantizers.rtn import RoundToNearest
from anyfit.testing.models import save_tiny, tiny_text


def table(bits: int) -> TableFormat:
    format_ = formats.get(f"table{bits}")
    assert isinstance(format_, TableFormat)
    return format_


def sample(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights of heavy tails, some of them twice, and importances that differ a lot."""
    generator = Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) ** 3 * 0.02
    weight[:, 1] = weight[:, 0]
    return weight, torch.randn(columns, generator=generator).exp() ** 2


def spread(values: np.ndarray, weights: np.ndarray) -> float:
    """Weighted squared error of a cluster around its mean."""
    if not len(values):
        return 0.0
    return float((weights * (values - np.average(values, weights=weights)) ** 2).sum())


def best_of_runs(values: np.ndarray, weights: np.ndarray, runs: int) -> float:
    """The textbook recursion over sorted numbers, every place for every border."""
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    costs = {(a, b): spread(values[a:b], weights[a:b]) for a in range(len(values)) for b in range(a + 1, len(values) + 1)}
    best = {end: costs[0, end] for end in range(1, len(values) + 1)}
    for number in range(2, runs + 1):
        best = {end: min(best[cut] + costs[cut, end] for cut in range(number - 1, end)) for end in range(number, len(values) + 1)}
    return best[len(values)]


def errors_of(codes: Tensor, weight: Tensor, importance: Tensor) -> list[float]:
    """Of each row, with the exact means of its clusters."""
    found = []
    for own, values in zip(codes.numpy(), weight.double().numpy(), strict=True):
        parts = [own == code for code in np.unique(own)]
        found.append(sum(spread(values[part], importance.double().numpy()[part]) for part in parts))
    return found


def test_no_assignment_of_codes_is_better() -> None:
    """All of them, not only runs of neighbours."""
    weight, importance = sample(6, 8)
    codes, _ = fit_tables(weight, importance, 2, seed=2)
    ours, counted = errors_of(codes, weight, importance), importance.double().numpy()
    every = np.array(list(itertools.product(range(4), repeat=8)))
    for error, row in zip(ours, weight.double().numpy(), strict=True):
        total = np.zeros(len(every))
        for code in range(4):
            mass = counted * (every == code)
            mean = (mass * row).sum(1) / np.maximum(mass.sum(1), 1e-300)
            total += (mass * (row - mean[:, None]) ** 2).sum(1)
        assert error == pytest.approx(total.min(), rel=1e-9)


@pytest.mark.parametrize(("seed", "columns"), [(2, 61), (3, 64), (4, 47)])
def test_the_seed_is_the_best_there_is(seed: int, columns: int) -> None:
    weight, importance = sample(5, columns, seed)
    codes = fit_tables(weight, importance, 6, seed)[0] >> (6 - seed)
    for error, row in zip(errors_of(codes, weight, importance), weight.double().numpy(), strict=True):
        assert error == pytest.approx(best_of_runs(row, importance.double().numpy(), 2**seed), rel=1e-9)


def test_below_the_seed_neighbours_are_one_cluster() -> None:
    weight, importance = sample(5, 61)
    for bits in (2, 3):
        codes, tables = fit_tables(weight, importance, bits)
        assert torch.equal(codes, fit_tables(weight, importance, 5)[0] >> (5 - bits)) and tables.shape == (5, entries(bits))
        counted, own = importance.double(), codes == 1
        means = (counted * weight.double() * own).sum(1) / (counted * own).sum(1)
        assert torch.allclose(tables[:, entries(bits) - 2**bits + 1].double(), means, rtol=1e-3)


def test_every_cluster_is_cut_where_it_is_best() -> None:
    weight, importance = sample(4, 80)
    counted = importance.double().numpy()
    codes = fit_tables(weight, importance, 6)[0].numpy()
    for own, values in zip(codes, weight.double().numpy(), strict=True):
        for bits in range(SEED, 6):
            upper, halves = own >> (6 - bits), own >> (5 - bits)
            for code in np.unique(upper):
                inside = upper == code
                if inside.sum() < 2:
                    continue
                expected = best_of_runs(values[inside], counted[inside], 2)
                found = sum(spread(values[halves == half], counted[halves == half]) for half in (2 * code, 2 * code + 1))
                assert found == pytest.approx(expected, rel=1e-6, abs=1e-12 * spread(values, counted))


def test_a_code_of_few_bits_is_the_upper_bits_of_a_code_of_many_and_more_bits_are_closer() -> None:
    weight, importance = sample(30, 264)
    weight[3], weight[4] = 0, 0.37
    weight[5, 9] = 500
    finest = table(8).encode(weight, importance)
    before = torch.full((30,), torch.inf, dtype=torch.float64)
    for bits in TABLE_BITS:
        own = table(bits).encode(weight, importance)
        assert torch.equal(own, table(8).lowered(table(bits), finest))
        assert torch.equal(table(bits).read(own)[0], table(8).read(finest)[0] >> (8 - bits))
        after = (importance.double() * (weight.double() - table(bits).decode(own).double()).square()).sum(1)
        assert (after <= before * (1 + 1e-9)).all(), bits
        before = after
    assert before.sum() < 1e-3 * (importance * weight.square()).sum()


def test_clusters_with_nothing_to_split_leave_their_entry_to_both_halves() -> None:
    weight = torch.tensor([[0.5, -0.25, 2.0, 0.5, 0.5, 2.0, -0.25, -0.25], [0.0] * 8, [3e-9] * 8])
    codes, tables = fit_tables(weight, torch.ones(8), 8)
    assert tables.isfinite().all() and torch.equal(looked_up(codes, tables)[:2], weight[:2])
    last = tables[:, entries(7) :]
    assert set(last[0].tolist()) == {0.5, -0.25, 2.0} and not last[1].any()
    assert all((row.diff() >= 0).all() for row in last), "in order"


def test_the_upper_row_of_bytes_is_tables_and_a_stream_of_codes() -> None:
    """Against numpy's own bits."""
    weight, importance = sample(5, 40)
    data = table(3).encode(weight, importance)
    assert data.shape == (5, table(3).row_bytes(40)) and table(3).row_bytes(40) == 2 * (4 + 8) + 15
    tables = np.ascontiguousarray(data[:, 8:24].numpy()).view(np.float16)
    stream = np.unpackbits(np.ascontiguousarray(data[:, 24:].numpy()), axis=1, bitorder="little").reshape(5, 40, 3)
    codes = (stream * np.array([1, 2, 4])).sum(-1)
    assert np.array_equal(table(3).decode(data).numpy(), np.take_along_axis(tables, codes, 1).astype(np.float32))


def test_which_formats_are_held_by_others() -> None:
    assert held(["F16", "table3", "table6", "int8_sym", "table2"]) == {"table3": "table6", "table2": "table6"}
    assert held(["F16", "table3", "int8_sym"]) == {} == held([])
    assert encoding.works(["table2", "F16", "table4"]) == [("F16", ()), ("table4", ("table2",))]


NAMES = ("table4", "table3", "table2")


@dataclass(frozen=True)
class Made:
    """A tiny network, its family, and what was asked for."""

    tiny: Path
    family: Family
    asked: dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("made")
    tiny, notes = save_tiny(folder / "tiny", "llama", num_hidden_layers=1), folder / "notes.txt"
    notes.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    asked = {"data": notes, "target": "transformers", "formats": NAMES, "length": 32, "segments": 8, "recipe": "any-precision"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finalists, "NUM_FINALISTS", 3)
        patch.setattr(pipeline, "NUM_PROBE_SEGMENTS", 2)
        patch.setattr(encoding, "COMPARED", 1)
        yield Made(tiny, anyfit.fit(tiny, output=folder / "whole.family", **asked), asked)


def test_one_stored_matrix_holds_every_size(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = made.family
    store = Store(family.path)
    for weight in (w for d in family.space.decisions for w in d.unit.weights):
        file = family.path / "variants" / f"{weight.name}.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size == formats.get("table4").bytes_(weight.shape) + header, "four bits alone"
        assert header < 2**15
        assert list(store.errors(weight.name)) == sorted(NAMES)
        assert store.errors(weight.name)["table2"] > store.errors(weight.name)["table3"] > store.errors(weight.name)["table4"] > 0
        some = torch.tensor([5, 1])
        assert torch.equal(store.variant(weight.name, "table2", some), store.variant(weight.name, "table2")[some])
    assert any(note.startswith("table2, table3, table4: nested, of each matrix the finest") for note in family.notes)
    alone = anyfit.fit(made.tiny, output=tmp_path / "alone.family", **made.asked | {"formats": ("BF16", "table3")})
    assert torch.equal(Store(alone.path).variant(weight.name, "table3"), store.variant(weight.name, "table3"))
    assert Store(alone.path).errors(weight.name)["table3"] == store.errors(weight.name)["table3"]

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Fit, "score", stopped)
        with pytest.raises(KeyboardInterrupt):
            anyfit.fit(made.tiny, output=tmp_path / "killed.family", **made.asked)
    assert anyfit.fit(made.tiny, output=tmp_path / "killed.family", **made.asked).digest == family.digest


def test_the_family_says_what_nesting_costs_at_each_size(made: Made) -> None:
    family, store = made.family, Store(made.family.path)
    for name in NAMES:
        point = next(point for point in family.points if point.uniform == name)
        told = next(note for note in family.notes if note.startswith(f"{name}: nested, KL "))
        assert point.search is not None and f"{point.search.kl_mean:.4g} on held-out text; tables of this size alone " in told  # type: ignore[attr-defined]
    names = [weight.name for decision in family.space.decisions for weight in decision.unit.weights]
    errors, alone = ({name: sum(of(weight)[name] for weight in names) for name in NAMES} for of in (store.errors, store.alone))
    assert alone["table3"] == pytest.approx(errors["table3"]), "the seed, from which the others are made"
    assert alone["table2"] < errors["table2"] and alone["table4"] < errors["table4"]


def test_tables_alone_are_compared_on_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are about what all rows come to."""
    monkeypatch.setattr(encoding, "COMPARED", 4)
    weight, importance = sample(256, 264)
    statistics = InputStatistics(importance.diag(), 1)
    made = encoding.variants(RoundToNearest(), weight, statistics, "table5", ["table4", "table3", "table2"])
    for name, nested in made.items():
        best = RoundToNearest().encode(weight, statistics, formats.get(name).alone)  # type: ignore[attr-defined]
        assert nested.alone is not None and float(nested.alone.sum()) == pytest.approx(best.error, rel=0.1), name
        assert best.error <= nested.error * (1 + 1e-6)
    assert encoding.variants(RoundToNearest(), weight, statistics, "table3", [])["table3"].alone is None


def test_formats_of_which_rows_are_too_short_leave_their_place_to_fewer_bits(made: Made) -> None:
    """Not to 16 bits, which would be stored besides."""
    run = prepare(made.tiny, **made.asked | {"formats": None})
    assert run.settings.formats == tuple(f"table{bits}" for bits in reversed(TABLE_BITS))
    assert set(run.space.formats()) < set(run.settings.formats)
    decision = next(d for d in run.space.decisions if d.unit.weights[0].block is not None)
    assert decision.refused["table8"].endswith(f"{decision.choices[0].name} takes its place")


def test_an_exported_folder_is_read_at_any_smaller_size(made: Made, tmp_path: Path) -> None:
    family = made.family
    point = next(point for point in family.points if point.uniform == "table4")
    export = family.export(f"{point.bytes_} B", tmp_path / "folder")
    assert {check.name: check.passed for check in export.checks} == dict.fromkeys(
        ("tensors", "values", "transformers", "logits", "tokenizer"), True
    )
    assert "import anyfit.transformers_plugin" in (tmp_path / "folder" / "README.md").read_text()
    stored = export.point.config.formats
    assert "table4" in stored.values()
    for bits in (4, 3, 2):
        config = AutoConfig.from_pretrained(tmp_path / "folder")
        config.quantization_config["bits"] = bits
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", config=config)
        assert not hasattr(model.config, "quantization_config") and model.dtype == torch.float32
        for name, format_ in stored.items():
            own = formats.get(format_)
            expected = table(min(bits, own.num_bits)) if isinstance(own, TableFormat) else own
            values = expected.decode(family.variants(export.point.config)(name, expected.name))
            assert torch.equal(model.get_parameter(name), values), (name, bits)
    settings = json.loads((tmp_path / "folder" / "config.json").read_text())
    settings["quantization_config"]["bits"] = 9
    (tmp_path / "folder" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"can't be read at 9 bits.*2 to 8"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "folder")


def test_a_size_can_be_refined(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebooks are found anew for what really arrives; there are no scales to tune."""
    family = Family.open(shutil.copytree(made.family.path, tmp_path / "x.family"))
    found: list[Tensor] = []

    def watched(self: TableFormat, weight: Tensor, importance: Tensor) -> Tensor:
        found.append(importance)
        return self.pack(*fit_tables(weight, importance, self.num_bits))

    monkeypatch.setattr(TableFormat, "encode", watched)
    refined = anyfit.refine(family, f"{family.space.bytes_(family.space.smallest())} B", model=made.tiny)
    assert refined.after.kl_mean <= refined.before.kl_mean
    assert len(found) == sum(d.unit.weights[0].block is not None for d in family.space.decisions) and not found[0].equal(torch.ones(64))


def test_where_tables_are_no_choice_the_recipe_says_so(made: Made, tmp_path: Path) -> None:
    for more in ({"target": "llama.cpp", "formats": None}, {"formats": ("F16", "int4_sym")}):
        with pytest.raises(UserError, match=r"any-precision is about table8.*--target transformers"):
            anyfit.fit(made.tiny, output=tmp_path / "x.family", **made.asked | more)
    assert not list(tmp_path.glob("*.family*"))
