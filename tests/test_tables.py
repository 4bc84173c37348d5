"""Data sets in columns: local ones as the `datasets` library writes them, and names of the hub."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anyfit.calibration import tables
from anyfit.calibration.data import Segments, held_out, load
from anyfit.calibration.tables import Hub, texts
from anyfit.core.errors import DataError, RuntimeMissingError
from anyfit.testing.models import tiny_tokenizer

datasets = pytest.importorskip("datasets")
TEMPLATE = "{% for m in messages %}{% if m.note is defined %}({{ m.note }}){% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture
def documents() -> list[str]:
    return [f"document {number:04d} " + "says little. " * 20 for number in range(300)]


def draw(data: Any, wanted: int = 6, seed: int = 0) -> Segments:
    return load(data, tiny_tokenizer(), length=32, num_calibration=wanted, num_search=2, num_report=2, seed=seed)


def saved(rows: list[str], path: Path, kind: str) -> Path:
    made = datasets.Dataset.from_dict({"text": rows, "id": list(range(len(rows)))})
    if kind == "parquet":
        made.to_parquet(str(path / "rows.parquet"))
        return path / "rows.parquet"
    if kind == "splits":
        made = datasets.DatasetDict(train=made.select(range(200)), test=made.select(range(200, len(rows))))
    made.save_to_disk(str(path / "saved"))
    return next((path / "saved").glob("*.arrow")) if kind == "arrow" else path / "saved"


@pytest.mark.usefixtures("same_random_state")
@pytest.mark.parametrize("kind", ["parquet", "folder", "splits", "arrow"])
def test_all_that_the_library_writes_is_read(documents: list[str], tmp_path: Path, kind: str) -> None:
    path = saved(documents, tmp_path, kind)
    assert sorted(texts(path, tiny_tokenizer(), enough=10**9, seed=0)) == documents
    first, again, other = draw(path), draw(str(path)), draw(path, seed=1)
    assert first.digest == again.digest != other.digest
    assert "says little" in tiny_tokenizer().decode(first.calibration.flatten())
    assert first.description == path.name


def test_mixes_with_files_and_inside_a_folder(documents: list[str], tmp_path: Path) -> None:
    saved(documents, tmp_path, "parquet")
    (tmp_path / "notes.txt").write_text("zebra " * 4000)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": "giraffe " * 40}) for _ in range(100)))
    (tmp_path / "cache-0123.arrow").write_bytes(b"left by the library")
    both = [draw(tmp_path, 300), draw([tmp_path / name for name in ("notes.txt", "rows.jsonl", "rows.parquet")], 300)]
    for segments in both:
        text = tiny_tokenizer().decode(segments.calibration.flatten())
        assert all(word in text for word in ("zebra", "giraffe", "says little"))
    assert torch.equal(both[0].calibration, both[1].calibration)


def test_of_a_large_one_only_what_is_needed_from_many_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [f"{number:05d} " + "x" * 94 for number in range(20_000)]
    path = tmp_path / "large.parquet"
    datasets.Dataset.from_dict({"text": rows}).to_parquet(str(path), batch_size=1000)
    read = 0
    original = tables.text_of

    def count(*given: Any) -> str:
        nonlocal read
        read += 1
        return original(*given)

    monkeypatch.setattr(tables, "text_of", count)
    found = [int(text[:5]) for text in texts(path, tiny_tokenizer(), enough=10_000, seed=0)]
    assert len(found) == read < 200
    assert len({number // 1000 for number in found}) >= 8
    assert found != [int(text[:5]) for text in texts(path, tiny_tokenizer(), enough=10_000, seed=1)]


def test_conversations_are_written_by_the_template_without_what_arrow_filled_in(tmp_path: Path) -> None:
    rows = [
        [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "reply " * 9, "note": "sure"}] for n in range(60)
    ]
    datasets.Dataset.from_dict({"messages": rows}).to_parquet(str(tmp_path / "chats.parquet"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = texts(tmp_path / "chats.parquet", tokenizer, enough=10**9, seed=0)
    assert found[7] == "[user] question 7\n(sure)[assistant] " + "reply " * 9 + "\n"
    with pytest.raises(DataError, match="no chat template"):
        texts(tmp_path / "chats.parquet", tiny_tokenizer(), enough=10**9, seed=0)


def test_rows_that_are_lines_make_one_text(tmp_path: Path) -> None:
    lines = [" = Title = \n", "", "First paragraph.\n", "", "Second one without an end"] * 30
    path = saved([*lines], tmp_path, "parquet")
    (joined,) = texts(path, tiny_tokenizer(), enough=10**9, seed=0)
    assert joined.startswith(" = Title = \n\nFirst paragraph.\n\nSecond one without an end\n = Title")
    rare = ["one document", *["another"] * 20, "", None]
    datasets.Dataset.from_dict({"text": rare}).to_parquet(str(tmp_path / "rare.parquet"))
    assert texts(tmp_path / "rare.parquet", tiny_tokenizer(), enough=10**9, seed=0) == rare[:21]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hf:wikitext", Hub("wikitext", None, None)),
        ("hf:Salesforce/wikitext:wikitext-2-raw-v1", Hub("Salesforce/wikitext", "wikitext-2-raw-v1", None)),
        ("hf:org/na.me_1@test", Hub("org/na.me_1", None, "test")),
        ("hf:org/name:a b@validation", Hub("org/name", "a b", "validation")),
    ],
)
def test_names_of_the_hub(given: str, expected: Hub) -> None:
    assert Hub.parse(given) == expected
    assert f"hf:{expected.name}" == given


class FakeHub:
    """Two configs of a data set with two splits; anything else is what the library says offline."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def load_dataset(self, path: str, config: str | None = None, *, streaming: bool) -> Any:
        assert streaming
        self.asked.append((path, config))
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one.")
        rows = {name: {"text": [f"{config} {name} {n} " + "word " * 50 for n in range(50)]} for name in ("test", "train")}
        return datasets.IterableDatasetDict({name: datasets.Dataset.from_dict(row).to_iterable_dataset() for name, row in rows.items()})


def test_a_name_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    tokens, description = held_out(["hf:org/words:small@test"], tiny_tokenizer(), length=32, num_segments=300)
    assert description == "org/words:small@test" and "small test" in tiny_tokenizer().decode(tokens.flatten())
    assert "small train" in tiny_tokenizer().decode(draw("hf:org/words:small", 300).calibration.flatten())
    assert hub.asked == [("org/words", "small")] * 2
    with pytest.raises(DataError, match=r"org/words has no split 'dev'\. It has: test, train"):
        draw("hf:org/words:small@dev")
    with pytest.raises(DataError, match=r"org/words can't be read as a data set: Config name is missing\. Check the name"):
        draw("hf:org/words")


def test_a_name_that_cannot_be_reached() -> None:
    with pytest.raises(DataError, match=r"org/none can't be read as a data set: .*org/none.* connection") as caught:
        draw("hf:org/none")
    assert caught.value.__cause__


def test_what_cannot_be_used_says_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"body": ["a"], "label": [1]}).to_parquet(str(path))
    with pytest.raises(DataError, match=r'rows\.parquet has neither a column "text" nor "messages"; it has: body, label'):
        draw(path)
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(str(path))
    with pytest.raises(DataError, match='has neither "text" nor "messages"'):
        draw(path)
    path.write_bytes(b"hello, this is no parquet")
    with pytest.raises(DataError, match=r"rows\.parquet can't be read as a data set"):
        draw(path)


def test_without_the_library_the_extra_is_named(documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(documents, tmp_path, "parquet")
    original = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "datasets")
    with pytest.raises(RuntimeMissingError, match=r"anyfit\[datasets\]"):
        draw(path)
