"""A Hugging Face tokenizer as the keys that llama.cpp rebuilds it from.

llama.cpp has two tokenizers that matter here: byte-level BPE, whose splitting rule it knows by a name, and the
SentencePiece kind, which merges by score. What neither of them can do is refused, not approximated.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from anyfit.core.errors import ModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2, DIGIT = "GPT-2", "digit"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"

SPLITTERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",), False): "qwen2",
    ((rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_TAIL}",), True): "tekken",
    ((rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_TAIL}",), False): "gpt-4o",
}
"""(splitting steps, whether a whole word that is a token is taken without merging) to llama.cpp's name for them."""

_SPACE = "▁"
_PHI3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """Everything that llama.cpp needs. `splitter` and `merges` are for byte-level BPE, `scores` for the other kind.

    `strips`: it drops spaces after special tokens as Phi-3's does, and has the tokens that llama.cpp expects then.
    """

    tokens: list[str]
    types: list[gguf.TokenType]
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    strips: bool
    chat_template: str | list[dict[str, str]] | None
    splitter: str | None = None
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    add_space_prefix: bool = False


def read(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Vocabulary:
    """Translate a tokenizer; the vocabulary is padded to the embedding's rows.

    Raises `ModelError` for a tokenizer that llama.cpp can't reproduce.
    """
    if not tokenizer.is_fast:
        raise _impossible("it is not one of the tokenizers library (there is no tokenizer.json)")
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    model = raw["model"]
    if model["type"] != "BPE":
        raise _impossible(f"its model is {model['type']!r}, and only BPE is written")
    merges = tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    if not merges:
        raise _impossible("it has no merges")
    tokens, types = _tokens(raw, config.get_text_config().vocab_size)
    add_bos, add_eos = _added(tokenizer)
    kind: dict[str, Any] = _sentencepiece(raw, tokens, merges) if model["byte_fallback"] else {"splitter": _splitter(raw), "merges": merges}
    ids = _ids(tokenizer, config, len(tokens))
    strips = any(token["rstrip"] for token in raw["added_tokens"]) and set(tokens) >= _PHI3
    return Vocabulary(tokens, types, ids, add_bos, add_eos, strips, _template(tokenizer), **kind)


def write(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the keys, in an order that is always the same."""
    writer.add_tokenizer_model("gpt2" if vocabulary.splitter else "llama")
    writer.add_tokenizer_pre(vocabulary.splitter or "default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.splitter:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    for name, number in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _impossible(reason: str) -> ModelError:
    return ModelError(f"llama.cpp can't reproduce this tokenizer: {reason}.", remedy="Export for the target transformers instead.")


def _tokens(raw: dict[str, Any], rows: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Texts and types by id; ids without a token are padded with texts that nothing else has."""
    byte_tokens = raw["model"]["byte_fallback"]
    texts: dict[int, str] = {number: text for text, number in raw["model"]["vocab"].items()}
    types = {
        number: gguf.TokenType.BYTE if byte_tokens and _BYTE.fullmatch(text) else gguf.TokenType.NORMAL for number, text in texts.items()
    }
    for token in raw["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        if byte_tokens and token["content"] == raw["model"]["unk_token"]:
            types[token["id"]] = gguf.TokenType.UNKNOWN
    taken = set(texts.values())
    for number in range(rows):
        if number not in texts:
            text = f"[PAD{number}]"
            while text in taken:
                text = f"[{text}]"
            texts[number], types[number] = text, gguf.TokenType.UNUSED
    return [texts[number] for number in range(rows)], [types[number] for number in range(rows)]


def _splitter(raw: dict[str, Any]) -> str:
    """llama.cpp's name for the way byte-level BPE splits text before it merges."""
    normalizer = raw["normalizer"]
    if normalizer and normalizer["type"] != "NFC":
        raise _impossible(f"it normalises text ({normalizer['type']}) before splitting")
    steps = tuple(name for step in _steps(raw["pre_tokenizer"]) if (name := _step(step)))
    ignore_merges = bool(raw["model"].get("ignore_merges"))
    if (steps, ignore_merges) not in SPLITTERS:
        whole_words = "taking" if ignore_merges else "not taking"
        raise _impossible(
            f"it splits text by {' then '.join(map(repr, steps)) or 'nothing'}, {whole_words} whole words, which has no name there"
        )
    return SPLITTERS[steps, ignore_merges]


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step["pretokenizers"] for inner in _steps(part)]
    return [step]


def _step(step: dict[str, Any]) -> str | None:
    """A splitting step as the table spells it; None where it splits nothing."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": True}:
            raise _impossible("it puts a space before the text")
        case {"type": "ByteLevel", "use_regex": True}:
            return GPT2
        case {"type": "ByteLevel"}:
            return None
        case {"type": "Digits", "individual_digits": True} | {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated"}:
            return DIGIT
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            return pattern
    return json.dumps(step, ensure_ascii=False)


def _sentencepiece(raw: dict[str, Any], tokens: list[str], merges: tuple[str, ...]) -> dict[str, Any]:
    """Scores that make llama.cpp merge in the order of the merges, and whether text starts with a space."""
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in raw["model"]["vocab"]]
    if missing:
        raise _impossible(f"it falls back to bytes but has no token {missing[0]}")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    # a token that no merge makes is never compared; last is where SentencePiece puts it too
    scores = tuple(-float(ranks.get(token, len(merges))) for token in tokens)
    return {"scores": scores, "add_space_prefix": _space_prefix(raw)}


def _space_prefix(raw: dict[str, Any]) -> bool:
    normalizer = raw["normalizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prefix, replaced = False, False
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                replaced = True
            case _:
                raise _impossible(f"it normalises text by {json.dumps(step, ensure_ascii=False)}")
    for step in _steps(raw["pre_tokenizer"]):
        match step:
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                prefix, replaced = scheme != "never", True
            case {"type": "Split", "pattern": {"String": " "}}:
                # nothing is left to split on once spaces are replaced
                pass
            case _:
                raise _impossible(f"it splits text by {json.dumps(step, ensure_ascii=False)}")
    if not replaced:
        raise _impossible(f"it does not write spaces as {_SPACE}")
    return prefix


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether encoding adds a start and an end token, found by encoding."""
    inner = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + inner + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise _impossible(f"it encodes 'a' as {whole}, which is not {inner} with a start or end token")


def _ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, rows: int) -> dict[str, int]:
    """Numbers of the special tokens; llama.cpp has defaults of its own for start and end, so these always stand."""
    ids: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
        configured = getattr(config, f"{name}_token_id", None)
        for number in (getattr(tokenizer, f"{name}_token_id", None), configured[0] if isinstance(configured, list) else configured):
            if number is not None and 0 <= number < rows:
                ids.setdefault(name, number)
    end = next((ids[name] for name in ("eos", "bos", "pad") if name in ids), None)
    if end is None:
        raise _impossible("it names no token that ends a text")
    return {"bos": end, "eos": end} | ids


def _template(tokenizer: PreTrainedTokenizerBase) -> str | list[dict[str, str]] | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in sorted(template.items())]
    return template
