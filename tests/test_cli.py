"""The command line: answers on standard output, everything else on standard error, exit codes that mean something."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_family import made_family
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from anyfit import api, cli, evaluation, finalists
from anyfit.core.budget import Budget
from anyfit.core.errors import DataError, UserError
from anyfit.family import Family
from anyfit.formats import formats
from anyfit.progress import JsonLines, Plain, Silent, duration
from anyfit.recipes import recipes
from anyfit.recipes.base import Training
from anyfit.searchers import searchers
from anyfit.targets import targets
from anyfit.tasks import harness
from anyfit.testing.models import tiny_text


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return made_family(tmp_path_factory.mktemp("families") / "demo.family")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def document(result: Result) -> Any:
    """The one JSON document on standard output."""
    if result.exit_code not in (0, 2) and result.exception:
        raise result.exception
    return json.loads(result.stdout)


def refused(result: Result) -> str:
    """The message of a user's error, without a traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


def test_help_and_listings_start_without_torch() -> None:
    code = "import sys; from anyfit.cli import app; app(['targets'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in targets)


@pytest.mark.parametrize("command", ["plan", "show", "export", "extract", "refine", "evaluate"])
def test_help_names_every_kind_of_budget(command: str) -> None:
    said = " ".join(CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "1000"}).stdout.split())
    original = {"bytes": 1e9, "ms": 10.0, "macs": 1e6, "weights": 1e6}
    costs = set()
    for text in ("1.5GB", "3.2 bits", "50%", "macs <= 60%", "weights <= 60%", "20ms", "2x"):
        assert text in said, text
        costs |= dict(Budget.parse(text, original=original).limits).keys()
    assert costs == {"bits", *original} and "members" in said


def test_module_runs_as_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "anyfit", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip().count(".") == 2
    assert result.stderr == ""


def test_listings_name_every_part() -> None:
    assert [row["name"] for row in document(run("targets", "--json"))] == list(targets)
    assert [row["name"] for row in document(run("recipes", "--json"))] == list(recipes)
    assert [row["name"] for row in document(run("searchers", "--json"))] == list(searchers)
    listed = document(run("formats", "--json"))
    assert {row["name"] for row in listed} == set(formats)
    assert "llama.cpp" in next(row for row in listed if row["name"] == "Q4_K")["targets"]
    for command in ("targets", "recipes", "searchers", "formats"):
        assert run(command).exit_code == 0


@pytest.mark.parametrize(
    ("option", "name", "known"),
    [
        ("--formats", "Q4_K,Q9_X", "Q8_0"),
        ("--target", "lama.cpp", "llama.cpp"),
        ("--recipe", "gptx", "gptq"),
        ("--search", "exat", "exact"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "fit"])
def test_unknown_names_are_refused_with_those_that_are_known(command: str, option: str, name: str, known: str) -> None:
    message = refused(run(command, option, name))
    assert name.split(",")[-1] in message
    assert known in message


def test_formats_may_be_repeated_or_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stop(model: str | None, **options: Any) -> None:
        seen.update(options, model=model)
        raise DataError("Stopped here.", remedy="Go on.")

    monkeypatch.setattr(api, "fit", stop)
    refused(run("fit", "some/model", "--formats", "Q4_K,Q6_K", "--format", "Q8_0", "--data", "a.txt", "--data", "b.txt", "-o", "x.family"))
    assert seen["formats"] == ["Q4_K", "Q6_K", "Q8_0"]
    assert seen["data"] == ["a.txt", "b.txt"]
    assert (seen["model"], seen["output"], seen["trust_remote_code"]) == ("some/model", Path("x.family"), False)


def test_errors_as_json_are_one_document(tmp_path: Path) -> None:
    result = run("show", tmp_path / "nothing.family", "--json")
    assert result.exit_code == 2
    assert set(document(result)) == {"error", "remedy"}
    assert "nothing.family" in document(result)["error"]


def test_show_prints_the_frontier_the_layers_and_the_page(family: Family) -> None:
    result = run("show", family.path, "--budget", "3MB")
    assert result.exit_code == 0
    assert "org/tiny-llama" in result.stdout
    assert "report.html" in result.stdout
    assert "Q4_K" in result.stdout
    assert result.stdout.count("●") >= len(family.frontier) - 1


def test_show_as_json_says_what_each_unit_got(family: Family) -> None:
    found = document(run("show", family.path, "--budget", "3MB", "--json"))
    assert [point["bytes"] for point in found["frontier"]] == [point.bytes_ for point in family.frontier]
    assert found["chosen"]["bytes"] <= 3_000_000
    assert set(found["chosen"]["formats"]) == {decision.unit.name for decision in family.space.decisions}


def test_budget_that_cannot_be_met_names_the_smallest(family: Family) -> None:
    assert f"{family.space.bytes_(family.space.smallest())}" in refused(run("show", family.path, "--budget", "1MB"))
    assert "Known units" in refused(run("show", family.path, "--budget", "3 parsecs"))


def test_export_adds_the_suffix_and_refuses_to_overwrite(family: Family, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_text("mine")
    assert "there.gguf exists" in refused(run("export", family.path, "--budget", "3MB", "-o", tmp_path / "there"))
    assert (tmp_path / "there.gguf").read_text() == "mine"
    (tmp_path / "UP.GGUF").write_text("mine")
    assert "UP.GGUF exists" in refused(run("export", family.path, "--budget", "3MB", "-o", tmp_path / "UP.GGUF"))


def test_outputs_may_be_in_the_home_folder(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there.gguf").write_text("mine")
    for command in ("export", "extract"):
        assert f"{tmp_path / 'there.gguf'}" in refused(run(command, family.path, "--budget", "3MB", "--output=~/there.gguf"))


def test_every_verb_on_a_real_family(tiny_llama_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text(tiny_text(6000))
    given = (tiny_llama_folder, "--data", text, "--formats", "Q2_K,Q4_0", "--recipe", "rtn", "--length", 32, "--segments", 4)
    planned = document(run("plan", *given, "--json"))
    made = document(run("fit", *given, "-o", tmp_path / "tiny.family", "--json"))
    assert made["original"]["parameters"] == planned["num_parameters"]
    family, budget = made["family"], f"{made['frontier'][0]['bytes'] + 20000}B"

    exported = document(run("export", family, "--budget", budget, "-o", tmp_path / "tiny", "--json"))
    assert Path(exported["path"]).stat().st_size == exported["bytes"] <= int(budget[:-1])
    assert all(check["passed"] for check in exported["checks"])

    extracted = document(run("extract", family, "--budget", budget, "-o", tmp_path / "folder", "--json"))
    assert extracted["config"] == exported["config"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    expected = Family.open(family).extract(budget).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())

    measured = document(run("evaluate", tmp_path / "folder", "--against", tiny_llama_folder, "--data", text, "--length", 32, "--json"))
    assert measured["quality"]["kl_mean"] > 0
    assert "exists" in refused(run("extract", family, "--budget", budget, "-o", tmp_path / "folder"))


def test_a_recipe_that_trains_takes_the_text_that_is_named(
    tiny_llama_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.get("llm-qfa")
    assert isinstance(recipe.training, Training)
    few = replace(recipe.training, settings=replace(recipe.training.settings, num_steps=4))
    monkeypatch.setitem(recipe.__dict__, "training", few)
    monkeypatch.setattr(finalists, "NUM_FINALISTS", 3)
    given = ("--recipe", "llm-qfa", "--data", text, "--target", "transformers", "--length", 32, "--segments", 8)
    result = run("fit", tiny_llama_folder, *given, "-o", tmp_path / "trained.family", "--json")
    family = Family.open(document(result)["family"])
    assert "train: 4 in " in result.stderr
    assert family.manifest.recipe == "llm-qfa" and "text.txt" in str(family.manifest.provenance["data"])
    for name in ("int4_offset", "int3_offset", "int2_offset"):
        assert any(note.startswith(f"{name}: trained, KL ") for note in family.notes), name


def test_plan_can_say_whether_text_is_enough(tiny_llama_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text(tiny_text(6000))
    given = ("plan", tiny_llama_folder, "--data", text, "--formats", "Q4_0", "--recipe", "rtn", "--length", 32, "--saturation")
    shown = run(*given, "--segments", 4).stdout
    assert "going from 2 to 4 segments" in shown
    assert re.search(r"4 +128 +0\.0", shown)
    assert "too little text" in run(*given, "--segments", 1).stdout


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("tokenizer.json", None, "KeyError: 'added_tokens'"),
        ("config.json", {"num_hidden_layers": "many"}, "num_hidden_layers.*expected int"),
    ],
)
def test_files_that_transformers_refuses_are_reported_with_its_reason(
    tiny_llama_folder: Path, tmp_path: Path, name: str, change: dict[str, Any] | None, reason: str
) -> None:
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    changed = json.loads((folder / name).read_text()) | change if change else {}
    (folder / name).write_text(json.dumps(changed))
    assert re.search(reason, refused(run("plan", folder, "--data", __file__)))


def test_full_disk_is_the_users_error(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x.gguf"))

    monkeypatch.setattr(Family, "export", full)
    assert "disk is full" in refused(run("export", family.path, "--budget", "3MB", "-o", tmp_path / "x.gguf"))


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_interrupt_says_what_is_kept(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "fit", interrupted)
    monkeypatch.setattr(Family, "export", interrupted)
    stopped, other = run("fit", "--json"), run("export", family.path, "--budget", "3MB", "-o", "x")
    assert stopped.exit_code == other.exit_code == 130
    assert "same command" in stopped.stderr
    assert json.loads(stopped.stdout)["error"] == "interrupted"
    assert other.stderr.strip() == "Stopped. Nothing was written."


def test_interrupt_of_the_first_import_is_one_line() -> None:
    code = (
        "import builtins, sys; real = builtins.__import__\n"
        "def stop(name, *rest):\n"
        "    if name == 'typer': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = stop; sys.argv = ['anyfit', 'targets', '--json']\n"
        "from anyfit.__main__ import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 130
    assert result.stderr.strip() == "Stopped. Nothing was written."
    assert json.loads(result.stdout)["error"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["export", "x.family"], "--budget"), (["fit", "--oops"], "--oops"), (["fit", "--seed", "many"], "--seed"), (["fitt"], "fitt")],
)
def test_usage_errors_as_json_are_one_document(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run([*arguments, "--json"])
    captured = capsys.readouterr()
    assert end.value.code == 2
    found = json.loads(captured.out)
    assert set(found) == {"error", "remedy"} and problem in found["error"]
    assert "Usage" in captured.err and problem in captured.err


def test_unknown_tasks_are_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(names: list[str]) -> None:
        raise UserError(f"no task {names}")

    monkeypatch.setattr(harness, "check_tasks", unknown)
    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    assert "no task ['foo', 'bar']" in refused(run("evaluate", "a/model", "--tasks", "foo,bar"))


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(api, "fit", broken)
    result = run("fit")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_prints_of_libraries_stay_off_standard_output(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    select = Family.select

    def chatty(self: Family, budget: Any) -> Any:
        print("a library says hello")
        return select(self, budget)

    monkeypatch.setattr(Family, "select", chatty)
    result = run("show", family.path, "--budget", "3MB", "--json")
    assert document(result)["chosen"]
    assert "hello" in result.stderr


def test_progress_without_a_terminal_is_one_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (Plain(sys.stderr), Silent()):
        with progress.stage("encode", 3) as stage:
            stage.advance(2, detail="q_proj")
            stage.advance()
        progress.note("a remark")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("encode: 3 in ")


def test_progress_for_machines_is_one_document_a_line() -> None:
    stream = io.StringIO()
    with JsonLines(stream).stage("encode", 4) as stage:
        stage.advance(3, detail="q_proj")
    JsonLines(stream).note("a remark")
    first, *_, last, note = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first["left"] is None and (first["stage"], first["done"], first["total"]) == ("encode", 0, 4)
    assert last["done"] == 4 and last["left"] == 0 and note == {"note": "a remark"}


@pytest.mark.parametrize(("seconds", "text"), [(0.42, "0.4 s"), (125, "2 min 05 s"), (12000, "3 h 20 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
