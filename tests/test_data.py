"""Segments: disjoint, reproducible, within the text; and text that can't be used is refused with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from anyfit.calibration import data as data_module
from anyfit.calibration import text as text_module
from anyfit.calibration.data import Segments, adds_bos, held_out, load
from anyfit.calibration.text import Line, Passage
from anyfit.core.errors import DataError
from anyfit.testing.models import tiny_text, tiny_tokenizer

LENGTH = 32
PURPOSES = ("calibration", "search", "report")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """Words that occur once each, so that overlaps show."""
    path = tmp_path / "numbered.txt"
    path.write_text(" ".join(f"w{number:06d}" for number in range(4000)))
    return path


def draw(data: object, tokenizer: PreTrainedTokenizerBase, *, wanted: tuple[int, int, int] = (8, 4, 4), seed: int = 0) -> Segments:
    calibration, search, report = wanted
    return load(data, tokenizer, length=LENGTH, num_calibration=calibration, num_search=search, num_report=report, seed=seed)  # type: ignore[arg-type]


def words(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Whole numbered words, segment by segment."""
    return [word for row in tokens for word in tokenizer.decode(row).split()[1:-1] if word.startswith("w")]


def chats(path: Path, count: int) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"hello {number}"}, {"role": "assistant", "content": "hi " * 20}]}
        for number in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.usefixtures("same_random_state")
@pytest.mark.parametrize("wanted", [(8, 4, 4), (10_000, 10_000, 10_000)], ids=["abundant", "scarce"])
def test_segments_share_nothing(numbered: Path, tokenizer: PreTrainedTokenizerBase, wanted: tuple[int, int, int]) -> None:
    segments = draw(numbered, tokenizer, wanted=wanted)
    seen = [word for purpose in PURPOSES for word in words(getattr(segments, purpose), tokenizer)]
    assert len(seen) == len(set(seen)) > 0
    text = set(numbered.read_text().split())
    assert set(seen) <= text
    for purpose, count in zip(PURPOSES, wanted, strict=True):
        tokens = getattr(segments, purpose)
        assert tokens.dtype == torch.int64 and tokens.shape[1] == LENGTH and len(tokens) <= count


def test_purposes_are_contiguous_parts_of_a_file(numbered: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    segments = draw(numbered, tokenizer)
    places = {purpose: [int(word[1:]) for word in words(getattr(segments, purpose), tokenizer)] for purpose in PURPOSES}
    assert max(places["calibration"]) < 0.71 * 4000
    assert 0.69 * 4000 < min(places["search"]) <= max(places["search"]) < 0.86 * 4000
    assert min(places["report"]) > 0.84 * 4000


def test_scarce_text_is_used_up_and_said(numbered: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    segments = draw(numbered, tokenizer, wanted=(10_000, 10_000, 1))
    total = len(tokenizer(numbered.read_text())["input_ids"])
    assert len(segments.calibration) == pytest.approx(0.7 * total / LENGTH, abs=2)
    assert len(segments.report) == 1
    assert [note.split("for ")[1] for note in segments.notes] == ["calibration, not 10000", "search, not 10000"]


def test_reproducible(numbered: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, other = (draw(numbered, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert torch.equal(first.calibration, again.calibration)


def test_many_documents_serve_one_purpose_each(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text(" ".join(f"w{number:03d}{word:03d}" for word in range(100)))
    segments = draw(tmp_path, tokenizer, wanted=(500, 500, 500))
    found = [{word[:4] for word in words(getattr(segments, purpose), tokenizer)} for purpose in PURPOSES]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert [len(part) for part in found] == [28, 6, 6]
    assert found[2] != {f"w{number:03d}" for number in range(34, 40)}


def test_several_files_and_a_folder_are_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    files = []
    for name in ("b.txt", "a.md"):
        files.append(tmp_path / name)
        files[-1].write_text(tiny_text(3000, seed=len(files)))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "empty.txt").touch()
    folder = draw(tmp_path, tokenizer)
    assert folder.digest == draw(sorted(files), tokenizer).digest
    assert folder.description == "a.md, b.txt"
    assert folder.notes == (f"1 empty files in {tmp_path} were left out",)


def test_rows_of_text_and_of_chats(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Öre {number} " * 20}) for number in range(100)))
    text = tokenizer.decode(draw(path, tokenizer).calibration.flatten())
    assert "Öre" in text and "</s>" in text
    templated = tiny_tokenizer()
    templated.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    assert "[assistant] hi hi" in templated.decode(draw(chats(tmp_path / "chat.jsonl", 100), templated).report.flatten())


def test_a_tokenizer_that_adds_bos_gets_it_on_every_segment(numbered: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    adding = tiny_tokenizer()
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert adds_bos(adding) and not adds_bos(tokenizer)
    with_bos = draw(numbered, adding)
    assert with_bos.search.shape == (4, LENGTH)
    assert (with_bos.search[:, 0] == 0).all() and not (with_bos.search[:, 1:] == 0).any()
    assert not (draw(numbered, tokenizer).search == 0).any()


def test_standard_library(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def modules(split: str) -> list[str]:
        asked.append(split)
        return [f"# {split}\n" + f"{split} = {split}\n" * 200] * 5

    monkeypatch.setattr(data_module, "modules", modules)
    segments = draw("stdlib", tokenizer)
    assert asked == ["train", "search", "report"]
    for purpose, split in zip(PURPOSES, asked, strict=True):
        assert set(tokenizer.decode(getattr(segments, purpose)[2]).split()[1:-1]) <= {split, "=", "#", "</s>#"}
    assert segments.description.startswith("the standard library of Python 3.")


def test_standard_library_by_name_unless_a_file_has_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "modules", lambda split: [f"{split} " * 500])
    monkeypatch.chdir(tmp_path)
    assert draw(["stdlib"], tokenizer).digest == draw("stdlib", tokenizer).digest
    (tmp_path / "stdlib").write_text(tiny_text(6000))
    assert draw(["stdlib"], tokenizer).description == "stdlib"


def test_held_out_takes_all_of_the_text(numbered: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens, description = held_out(numbered, tokenizer, length=LENGTH, num_segments=10_000)
    assert len(tokens) == len(tokenizer(numbered.read_text())["input_ids"]) // LENGTH
    assert description == "numbered.txt"
    with pytest.raises(DataError, match="fewer than one segment"):
        held_out(numbered, tokenizer, length=1_000_000, num_segments=1)


def test_little_of_a_large_file_is_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.txt"
    path.write_text(tiny_text(20_000) * 200)
    read = 0
    original = Passage.read

    def count(self: Passage, start: int, stop: int) -> str:
        nonlocal read
        read += stop - start
        return original(self, start, stop)

    monkeypatch.setattr(Passage, "read", count)
    segments = draw(path, tokenizer)
    assert path.stat().st_size > 20_000_000
    assert read < 16 * 16 * LENGTH
    assert [len(getattr(segments, purpose)) for purpose in PURPOSES] == [8, 4, 4]


def test_blocks_of_large_jsonl(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"w{number:06d} " * 5}) for number in range(5000)))
    monkeypatch.setattr(text_module, "_LARGEST_JSONL", 40_000)
    monkeypatch.setattr(text_module, "_BLOCK", 4_000)
    passages, notes = text_module.documents([path], tokenizer, enough=1000, seed=0)
    numbers = [int(passage.read(0, 7)[1:]) for passage in passages]
    assert numbers == sorted(set(numbers)) and 500 < len(numbers) < 1000
    assert numbers[0] == 0 and numbers[-1] == 4999
    assert "10 evenly spaced blocks" in notes[0]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_cuts_neither_break_nor_lose_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    text = "aé漢🙂" * 20
    path = tmp_path / "wide.txt"
    path.write_text(text)
    whole = Passage(path, 0, path.stat().st_size)
    pieces = [whole.read(at, at + step) for at in range(0, whole.size, step)]
    assert "".join(pieces) == text
    for passage in (whole, Passage.of(text)):
        assert "".join(part.read(0, part.size) for part in passage.cut((0.01 * step, 0.13, 0.87 - 0.01 * step))) == text
    monkeypatch.setattr(text_module, "_PIECE", step)
    assert ["".join(pieces) for pieces in Line([whole]).read(0, whole.size)] == [text]
    line = Line([Passage.of("abc"), Passage.of(""), Passage.of("défg")])
    assert line.size == 8
    assert ["".join(pieces) for pieces in line.read(1, 7)] == ["bc", "déf"]
    assert ["".join(pieces) for pieces in line.read(3, 5)] == ["dé"]


def write(name: str, content: bytes | str) -> Callable[[Path], object]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


ROW = '{"text": "fine"}\n'
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing named": (lambda folder: [], "No text was named"),
    "missing": (lambda folder: folder / "missing.txt", r"There is no file or folder .*missing\.txt"),
    "no name of the hub": (lambda folder: "hf:a/b/c", "hf:a/b/c is no name of a data set"),
    "name of something here": (lambda folder: "hf:tests", "there is a file or folder tests here"),
    "empty": (write("empty.txt", b""), r"empty\.txt is empty"),
    "folder without text": (lambda folder: folder, "has no text files"),
    "latin-1": (write("latin.txt", "naïve ".encode("latin-1") * 500), r"latin\.txt is not UTF-8: byte 2 is 0xef"),
    "latin-1 later": (write("late.txt", b"a" * 200_000 + b"\xff" + b"a" * 9), r"late\.txt is not UTF-8: byte 200000 is 0xff"),
    "utf-16": (write("wide.txt", ("text " * 500).encode("utf-16")), "is not UTF-8: byte 0"),
    "binary": (write("zeros.txt", b"text\0" * 5000), r"zeros\.txt is binary, not text: byte 4 is zero"),
    "row not JSON": (write("rows.jsonl", ROW + "{oops\n"), r"rows\.jsonl, line 2 is not JSON"),
    "row without text": (write("rows.jsonl", ROW + ROW + '{"body": 1}\n'), r"line 3 has neither"),
    "row not UTF-8": (write("rows.jsonl", ROW.encode() + b'{"text": "\xff"}'), "is not UTF-8: byte 27"),
    "chat without template": (lambda folder: chats(folder / "chat.jsonl", 3), "line 1 .*no chat template"),
    "blank": (write("blank.txt", b" \n" * 10), "tokens"),
    "short": (write("short.txt", tiny_text(40)), r"short\.txt has \d+ tokens .* a segment of 32, in all about 213"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_used(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    make, message = BAD[kind]
    with pytest.raises(DataError, match=message) as caught:
        draw(make(tmp_path), tokenizer, wanted=(5000, 5000, 5000))
    assert caught.value.remedy


def test_an_encoder_needs_texts_not_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    blank = write("blank.jsonl", '{"text": " "}\n')(tmp_path)
    with pytest.raises(DataError, match=r"tokens .*; each of the three needs a text\.") as caught:
        load(blank, tokenizer, length=32, num_calibration=8, num_search=2, num_report=2, texts=True)
    assert "--length" not in caught.value.remedy


def test_messages_that_the_template_refuses(tmp_path: Path) -> None:
    templated = tiny_tokenizer()
    templated.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"line 1: the chat template refuses .*roles must alternate"):
        draw(chats(tmp_path / "chat.jsonl", 3), templated)
