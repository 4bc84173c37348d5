"""The main line end to end on a tiny network: fit, kill, continue, select, extract, export, tamper."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import anyfit
from anyfit import closing, finalists, pipeline
from anyfit.checkpoint import Checkpoint
from anyfit.core import memory
from anyfit.core.errors import BudgetError, FamilyError, ModelError, OutputError, UnknownNameError, UserError
from anyfit.core.files import sha256
from anyfit.family.family import Family
from anyfit.family.journal import Journal
from anyfit.targets import gguf_check
from anyfit.tasks.language import Reference, measure
from anyfit.testing.models import save_tiny

FORMATS = ("BF16", "Q8_0", "Q4_K", "Q2_K")
SMALL: dict[str, Any] = {"formats": FORMATS, "length": 32, "segments": 8}


FEWER = "finalists.NUM_FINALISTS, pipeline.NUM_PROBE_SEGMENTS = 5, 4"


@pytest.fixture(scope="module", autouse=True)
def fewer_measurements() -> Iterator[None]:
    """A fit that measures less; another process is told by `FEWER`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finalists, "NUM_FINALISTS", 5)
        patch.setattr(pipeline, "NUM_PROBE_SEGMENTS", 4)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny-llama", "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def family(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    state = torch.random.get_rng_state()
    made = anyfit.fit(tiny, data=text, output=tmp_path_factory.mktemp("family") / "tiny.family", **SMALL)
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state is never touched"
    return made


@pytest.fixture
def copy(family: Family, tmp_path: Path) -> Path:
    return Path(shutil.copytree(family.path, tmp_path / "copy.family"))


def test_the_folder_is_whole(family: Family) -> None:
    assert not list(family.path.rglob("*.partial")) and not family.path.with_name("tiny.family.partial").exists()
    assert {p.name for p in family.path.iterdir()} == {
        "family.json",
        "report.html",
        "variants",
        "source",
        "passthrough.safetensors",
        "text.safetensors",
    }
    assert str(family.path.parent) not in (family.path / "family.json").read_text()


def test_another_process_makes_the_same_family(family: Family, tiny: Path, text: Path, tmp_path: Path) -> None:
    code = (
        f"import sys, anyfit, torch; from anyfit import finalists, pipeline; torch.set_num_threads(1); {FEWER};"
        f"family = anyfit.fit(sys.argv[1], data=sys.argv[2], output=sys.argv[3], formats={FORMATS!r}, length=32, segments=8);"
        "family.export('60%', sys.argv[4], check=False)"
    )
    other = tmp_path / "other.family"
    subprocess.run([sys.executable, "-c", code, str(tiny), str(text), str(other), str(tmp_path / "b.gguf")], check=True)
    assert Family.open(other).digest == family.digest
    family.export("60%", tmp_path / "a.gguf", check=False)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_killed_run_continues_to_the_same_bytes(
    family: Family, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, encoded = tmp_path / "killed.family", []
    writing = pipeline.Store.writing

    def killing(limit: int) -> Any:
        def counted(store: pipeline.Store, weight: str, shapes: Any) -> Any:
            if len(encoded) == limit:
                raise KeyboardInterrupt
            encoded.append(weight)
            return writing(store, weight, shapes)

        return counted

    for limit in (3, 9):
        monkeypatch.setattr(pipeline.Store, "writing", killing(limit))
        with pytest.raises(KeyboardInterrupt):
            anyfit.fit(tiny, data=text, output=output, **SMALL)
        assert not output.exists()
    monkeypatch.setattr(pipeline.Store, "writing", killing(10**6))
    (tmp_path / "killed.family.partial" / "variants" / ".left.safetensors.1.partial").write_bytes(b"half")
    assert anyfit.fit(tiny, data=text, output=output, **SMALL).digest == family.digest
    again = len(encoded) - len(set(encoded))
    assert again <= 2 * 2, "of what was finished, only matrices that are encoded with an unfinished one are computed again"
    assert os.listdir(tmp_path) == ["killed.family"]


def test_an_unfinished_run_of_something_else_is_named(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "other.family"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Fit, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            anyfit.fit(tiny, data=text, output=output, **SMALL)
    with pytest.raises(FamilyError, match=r"seed was 0 and is 1.*--restart"):
        anyfit.fit(tiny, data=text, output=output, seed=1, **SMALL)


def test_frontier_is_sorted_and_not_dominated(family: Family) -> None:
    sizes = [point.bytes_ for point in family.frontier]
    losses = [point.search.kl_mean for point in family.frontier if point.search]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True) and len(sizes) >= 3
    assert {point.uniform for point in family.points} >= set(FORMATS)


def test_every_budget_is_kept_and_uniform_settings_never_win(family: Family) -> None:
    for share in (25, 30, 40, 55, 70, 90):
        budget = family.budget(f"{share}%")
        point = family.select(budget)
        assert budget.allows({"bytes": point.bytes_, "bits": point.bits})
        rivals = [p.search.kl_mean for p in family.points if p.search and p.uniform and budget.allows({"bytes": p.bytes_, "bits": p.bits})]
        expected = point.search.kl_mean if point.search else family.expected(point.predicted)
        assert all(expected <= rival for rival in rivals)


def test_extracted_model_equals_the_exported_file(family: Family, tmp_path: Path) -> None:
    export = family.export("2.9 bits" if family.frontier[0].bits < 2.9 else "50%", tmp_path / "model.gguf")
    assert export.bytes_ == (tmp_path / "model.gguf").stat().st_size == family.space.bytes_(export.point.config)
    assert export.checks and all(check.passed for check in export.checks)
    assert (tmp_path / "model.README.md").exists()


def test_a_reader_that_needs_the_whole_network_is_skipped_where_memory_lacks(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free", lambda: 1_000_000)
    checks = {check.name: check for check in family.export("50%", tmp_path / "model.gguf").checks}
    assert checks["transformers"].detail.startswith("skipped: it would hold the whole network in memory")
    assert not checks["audit"].detail.startswith("skipped") and not checks["gguf package"].detail.startswith("skipped")


def test_a_full_folder_for_temporary_files_is_not_the_written_files_fault(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf_check, "_read_back", full)
    with pytest.raises(OutputError, match="The disk is full") as error:
        family.export("50%", tmp_path / "model.gguf")
    assert str(tmp_path) not in error.value.problem and not list(tmp_path.iterdir())


def test_extract_at_the_largest_format_is_the_original(family: Family, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    extracted = family.extract(family.space.uniform("BF16"))
    original = AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokens = family.text()["search"][:2]
    with torch.inference_mode():
        difference = (extracted(tokens).logits - original(tokens).logits).abs().max()
    assert difference < 0.05
    assert extracted.get_input_embeddings().weight is extracted.get_output_embeddings().weight


def test_quality_of_a_point_is_what_the_extracted_model_has(family: Family, tiny: Path) -> None:
    point = family.frontier[0]
    assert point.search is not None
    reference = Reference.of(Checkpoint.open(tiny).load(), family.text()["search"])
    assert measure(family.extract(point.config), reference).kl_mean == pytest.approx(point.search.kl_mean, rel=1e-4)


def test_impossible_budget(family: Family, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smallest possible"):
        family.export("1 KB", tmp_path / "x.gguf")
    assert not os.listdir(tmp_path)


def test_nothing_is_written_into_a_family(family: Family) -> None:
    before = sorted(family.path.rglob("*"))
    for write in (family.export, family.save):
        with pytest.raises(OutputError, match="inside the family"):
            write("60%", family.path / "sub" / "x.gguf")
    assert sorted(family.path.rglob("*")) == before


def test_existing_output_is_kept_without_force(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        family.export("60%", path)
    assert path.read_text() == "precious"
    family.export("60%", path, force=True, check=False)
    assert path.read_bytes()[:4] == b"GGUF"


def test_altered_variant_is_found_before_it_is_used(copy: Path, tmp_path: Path) -> None:
    victim = max((copy / "variants").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-100] ^= 1
    victim.write_bytes(data)
    with pytest.raises(FamilyError, match=rf"{victim.name} was altered"):
        Family.open(copy).export("60%", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_altered_manifest_is_found(copy: Path) -> None:
    path = copy / "family.json"
    data = json.loads(path.read_text())
    data["points"][0]["bytes"] -= 1
    path.write_text(json.dumps(data))
    with pytest.raises(FamilyError, match="altered"):
        Family.open(copy)


def test_newer_family_is_told(copy: Path) -> None:
    path = copy / "family.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 999}))
    with pytest.raises(FamilyError, match="newer"):
        Family.open(copy)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"anyfit": "family"}', "\x00"])
def test_a_broken_manifest_is_a_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "family.json").write_text(content)
    with pytest.raises(FamilyError):
        Family.open(tmp_path)


def test_fit_refuses_early(tiny: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"llama\.cpp"):
        anyfit.fit(tiny, data=text, target="lama.cpp")
    with pytest.raises(UnknownNameError, match="Q4_K"):
        anyfit.fit(tiny, data=text, formats=["Q4_KM"])
    with pytest.raises(UserError, match="doesn't load"):
        anyfit.fit(tiny, data=text, formats=["int4_sym"])
    with pytest.raises(ModelError):
        anyfit.fit(tmp_path / "nowhere", data=text)
    with pytest.raises(UserError, match="context"):
        anyfit.fit(tiny, data=text, length=10**6)
    assert not list(tmp_path.iterdir())


def test_the_original_is_not_touched(family: Family, tiny: Path) -> None:
    assert sorted(p.name for p in tiny.iterdir()) == sorted(
        p.name for p in save_tiny(tiny.parent / "again", "llama", tie_word_embeddings=True).iterdir()
    )
    assert sha256(tiny / "model.safetensors") == sha256(tiny.parent / "again" / "model.safetensors")


def test_force_replaces_only_a_family(tiny: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").touch()
    for output in (tiny, text, text.parent, tmp_path / "thesis"):
        with pytest.raises(OutputError):
            anyfit.fit(tiny, data=text, output=output, force=True, **SMALL)
    assert (tmp_path / "thesis" / "thesis.txt").exists() and text.exists() and (tiny / "config.json").exists()


def test_an_output_that_appears_during_the_run_is_kept(tiny: Path, text: Path, family: Family, tmp_path: Path) -> None:
    output = tmp_path / "late.family"
    write = closing.write_json

    def appearing(path: Path, data: Any) -> None:
        output.mkdir(exist_ok=True)
        (output / "thesis.txt").touch()
        write(path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closing, "write_json", appearing)
        with pytest.raises(OutputError, match="appeared"):
            anyfit.fit(tiny, data=text, output=output, **SMALL)
    assert [p.name for p in output.iterdir()] == ["thesis.txt"]
    shutil.rmtree(output)
    assert anyfit.fit(tiny, data=text, output=output, **SMALL).digest == family.digest


def test_a_folder_in_the_place_of_the_journal_is_left_alone(tiny: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "x.family.partial").mkdir()
    (tmp_path / "x.family.partial" / "thesis.txt").touch()
    with pytest.raises(FamilyError, match=r"holds thesis\.txt"):
        anyfit.fit(tiny, data=text, output=tmp_path / "x.family", **SMALL)


def test_restart_waits_for_nobody(tmp_path: Path) -> None:
    final, key = tmp_path / "x.family", {"model": "a"}
    with Journal.open(final, key, restart=False, force=False) as journal:
        (journal.folder / "work").touch()
        with pytest.raises(OutputError, match="Another process"), Journal.open(final, key, restart=True, force=False):
            pass
        assert (journal.folder / "work").exists()


def test_a_broken_journal_is_told(tmp_path: Path) -> None:
    final = tmp_path / "x.family"
    with Journal.open(final, {"model": "a"}, restart=False, force=False) as journal:
        (journal.folder / "journal.json").write_text("{")
    with pytest.raises(FamilyError, match="--restart"), Journal.open(final, {"model": "a"}, restart=False, force=False):
        pass
    with Journal.open(final, {"model": "b"}, restart=True, force=False):
        pass


def test_a_card_of_the_user_is_not_overwritten(family: Family, tmp_path: Path) -> None:
    (tmp_path / "x.README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"x\.README\.md exists"):
        family.export("60%", tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == ["x.README.md"]


def test_a_file_added_to_the_source_is_found(copy: Path, tmp_path: Path) -> None:
    (copy / "source" / "evil.py").touch()
    with pytest.raises(FamilyError, match=r"evil\.py was added"):
        Family.open(copy).export("60%", tmp_path / "x.gguf")


def test_saved_folder_is_the_extracted_model(family: Family, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family.save("60%", tmp_path / "folder")
    tokens = family.text()["search"][:2]
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
        assert torch.equal(loaded(tokens).logits, family.extract("60%")(tokens).logits)
    family.save("60%", tmp_path / "folder", force=True)
    with pytest.raises(OutputError):
        family.save("60%", family.path, force=True)


def test_what_the_checkpoint_holds_too_much_is_covered(tiny: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny, tmp_path / "more"))
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "model.layers.0.secret.weight": torch.ones(3)}, model / "model.safetensors", metadata={"format": "pt"})
    found = anyfit.plan(model, data=text, **SMALL)
    assert ("model.layers.0.secret.weight", "", "stored in the checkpoint, but the network has no place for it") in found.coverage
    assert found.memory_bytes > 0 and found.seconds > 0 and found.smallest_bytes < found.largest_bytes


def test_plan_with_floating_formats_only_and_with_none(tiny: Path, text: Path) -> None:
    assert anyfit.plan(tiny, data=text, **{**SMALL, "formats": ["F16"]}).seconds > 0
    with pytest.raises(UserError, match="No format"):
        anyfit.plan(tiny, data=text, **{**SMALL, "formats": []})


def test_a_weight_beyond_a_format_is_named(tiny: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny, tmp_path / "huge"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight can't be stored as F16.*--formats Q8_0"):
        anyfit.fit(model, data=text, output=tmp_path / "x.family", **{**SMALL, "formats": ["F16", "Q8_0"]})
