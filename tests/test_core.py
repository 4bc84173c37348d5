"""Budgets, configs, names and files: what needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyfit.core.budget import Budget, describe, typed
from anyfit.core.config import Config
from anyfit.core.errors import BudgetError, OutputError, UnknownNameError
from anyfit.core.files import refuse_existing, written_aside
from anyfit.core.registry import Registry


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("1.5GB", {"bytes": 1.5e9}),
        ("90MB", {"bytes": 90e6}),
        ("<= 90 mb", {"bytes": 90e6}),
        ("bytes<=3.2GB", {"bytes": 3.2e9}),
        ("2GiB", {"bytes": 2 * 2**30}),
        ("3.2 bits", {"bits": 3.2}),
        ("3.2bpw", {"bits": 3.2}),
        ("bits <= 3.2", {"bits": 3.2}),
        ("50%", {"bytes": 500.0}),
        ("90MB, 3.2 bits", {"bytes": 90e6, "bits": 3.2}),
        ("90MB and 80MB", {"bytes": 80e6}),
        ("1,500,000 B", {"bytes": 1.5e6}),
        ("1_500_000B", {"bytes": 1.5e6}),
        ("20ms", {"ms": 20.0}),
        ("ms <= 0.5 s", {"ms": 500.0}),
        ("2x", {"ms": 4.0}),
        ("ms <= 75%", {"ms": 6.0}),
        ("1.2 GMACs", {"macs": 1.2e9}),
        ("macs <= 60%", {"macs": 30e6}),
        ("1.5x and 90MB", {"bytes": 90e6, "ms": 16 / 3}),
    ],
)
def test_budgets_as_people_type_them(text: str, limits: dict[str, float]) -> None:
    assert dict(Budget.parse(text, original={"bytes": 1000, "ms": 8, "macs": 50e6}).limits) == pytest.approx(limits)


@pytest.mark.parametrize(
    ("cost", "value"),
    [("ms", 1.2345674), ("ms", 1100000 * 1e-6), ("ms", 0.0), ("bits", 3.14159), ("bytes", 7), ("macs", 123456789.0), ("weights", 5.0)],
)
def test_a_cost_that_is_typed_as_a_budget_is_met(cost: str, value: float) -> None:
    limits = dict(Budget.parse(typed(cost, value)).limits)
    assert limits.keys() == {cost} and value <= limits[cost] <= value + 0.0011


@pytest.mark.parametrize(
    "text",
    ["", "lots", "5 parsecs", "12", "-3GB", "0MB", "1.2.3GB", "GB", "3.2 bits GB", "nan GB", "1e400", "bits 3x", "ms 3GB", "5 ms/mile"],
)
def test_text_that_is_no_budget_lists_the_units(text: str) -> None:
    with pytest.raises(BudgetError, match=r"GB"):
        Budget.parse(text)


@pytest.mark.parametrize(("text", "missing"), [("50%", "size"), ("2x", "latency"), ("macs 50%", "multiply-adds")])
def test_budgets_relative_to_what_is_not_known(text: str, missing: str) -> None:
    with pytest.raises(BudgetError, match=missing):
        Budget.parse(text)


@given(st.floats(min_value=1, max_value=9e14), st.sampled_from(["B", "KB", "MB", "GB", "KiB", "GiB"]))
def test_any_number_with_a_unit_is_read(number: float, unit: str) -> None:
    size = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "GiB": 2**30}[unit]
    assert dict(Budget.parse(f"{number:.6f}{unit}").limits)["bytes"] == pytest.approx(number * size, rel=1e-6, abs=1e-5)


def test_describe_reads_like_a_person() -> None:
    assert [describe("bytes", 1.5e9), describe("bytes", 90e6), describe("bits", 3.2)] == ["1.50 GB", "90.00 MB", "3.20 bits"]


def test_config_is_a_value() -> None:
    config = Config.of_formats({"b": "Q4_K", "a": "Q6_K"})
    again = Config.from_json(json.loads(json.dumps(config.to_json())))
    assert config == again and hash(config) == hash(again) and config.digest == again.digest
    assert config.digest != Config.of_formats({"b": "Q4_K", "a": "Q5_K"}).digest


def test_config_digest_is_the_same_in_another_process() -> None:
    code = "from anyfit.core.config import Config; print(Config.of_formats({'b': 'Q4_K', 'a': 'Q6_K'}).digest)"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert other.stdout.strip() == Config.of_formats({"b": "Q4_K", "a": "Q6_K"}).digest


def test_unknown_name_lists_the_known_and_the_nearest() -> None:
    registry: Registry[object] = Registry("format", {"Q4_K": "x:y", "Q5_K": "x:z"})
    with pytest.raises(UnknownNameError, match=r"Q4_KM.*Did you mean 'Q4_K'.*Q5_K"):
        registry.get("Q4_KM")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_aside(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.bin"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").touch()
    with written_aside(path) as aside:
        aside.mkdir()
        (aside / "new").touch()
    assert os.listdir(path) == ["new"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("34816 requested and 9696 written"),
    ],
)
def test_full_disk_is_told_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OutputError, match="disk is full"), written_aside(tmp_path / "out.bin") as aside:
        aside.write_text("half")
        raise error
    assert not os.listdir(tmp_path)


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    with pytest.raises(OutputError, match="appeared"), written_aside(path, force=False) as aside:
        aside.write_text("new")
        path.write_text("precious")
    assert path.read_text() == "precious" and os.listdir(tmp_path) == ["out.bin"]


def test_what_a_killed_process_left_is_removed_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    (tmp_path / f".out.bin.{killed.pid}.partial").touch()
    (tmp_path / f".out.bin.{os.getppid()}.partial").touch()
    (tmp_path / "out.bin.partial").write_text("a user's own")
    with written_aside(tmp_path / "out.bin") as aside:
        aside.write_text("new")
    assert sorted(os.listdir(tmp_path)) == [f".out.bin.{os.getppid()}.partial", "out.bin", "out.bin.partial"]


def test_existing_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(OutputError, match="exists"):
        refuse_existing(tmp_path / "out", force=False)
    refuse_existing(tmp_path / "out", force=True)
    with pytest.raises(OutputError, match="is a file"):
        refuse_existing(tmp_path / "out" / "below", force=False)
    for unlike in ("folder", "link"):
        with pytest.raises(OutputError, match="isn't something like"):
            refuse_existing(tmp_path / unlike, force=True)


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    given = tmp_path / "data" / "notes.txt"
    given.parent.mkdir()
    given.touch()
    for output in (given, given.parent, tmp_path / "data" / ".." / "data"):
        with pytest.raises(OutputError, match="is, or holds"):
            refuse_existing(output, force=True, ours=lambda path: True, inputs=[given])


def test_core_needs_no_torch() -> None:
    code = "import sys, anyfit.core.space, anyfit.core.budget, anyfit.core.files, anyfit.core.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
