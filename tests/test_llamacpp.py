"""The llama.cpp target: exact sizes, and the same network and tokenizer in every reader of the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from anyfit.architectures import architecture_of
from anyfit.architectures.coverage import passthrough
from anyfit.architectures.llama import LLAMA
from anyfit.calibration.statistics import InputStatistics
from anyfit.checkpoint import Checkpoint, Source
from anyfit.core.config import WIDTH, Config
from anyfit.core.errors import ModelError, RuntimeMissingError, UserError
from anyfit.formats import formats
from anyfit.quantizers.rtn import QUANTIZER
from anyfit.structure.cutting import Kept, cut
from anyfit.structure.space import structures
from anyfit.targets import gguf_check, gguf_kinds, gguf_layout, gguf_tokenizer, llamacpp_runtime
from anyfit.targets.base import Cut
from anyfit.targets.llamacpp import TARGET, logits, read_model
from anyfit.testing.models import save_tiny, tiny_text, tiny_tokenizer
from anyfit.testing.targets import CHECKS, Trial, flip_bit

needs_llamacpp = pytest.mark.skipif(not llamacpp_runtime.installed(), reason="llama-cpp-python is not installed")
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox")
NOT_READ_BY_TRANSFORMERS = {"gemma", "gpt_neox"}
TOKENS = torch.arange(96).reshape(2, 48)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + i / 10 for i in range(32)],
    "long_factor": [2 + i / 3 for i in range(32)],
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "narrow heads": ("llama", {"head_dim": 32}),
    "llama3 scaling": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "yarn": ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.5}}),
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256}),
    "partial rotation": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "global layer, scaled": (
        "gemma3_text",
        {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 16,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "own head": ("gpt2", {"tie_word_embeddings": False}),
    "tied where llama.cpp can't": ("gpt_neox", {"tie_word_embeddings": True}),
    "one after the other": ("gpt_neox", {"use_parallel_residual": False}),
}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trial]:
    @cache
    def make(kind: str) -> Trial:
        return Trial.of(TARGET, save_tiny(tmp_path_factory.mktemp("models") / kind, kind))

    return make


def _everywhere(trial: Trial, name: str) -> Config:
    config = trial.space.uniform(name)
    assert config is not None
    return config


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(trial: Callable[[str], Trial], check: Callable[[Trial, Path], None], tmp_path: Path) -> None:
    check(trial("llama"), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_agrees_on_mixed_formats(trial: Callable[[str], Trial], kind: str, tmp_path: Path) -> None:
    made = trial(kind)
    # each kind starts at another format, so that between them every kind of matrix meets most formats
    shift = KINDS.index(kind)
    config = Config({d.key: d.choices[(index + shift) % len(d.choices)].name for index, d in enumerate(made.space.decisions)})
    path = tmp_path / "model.gguf"
    assert made.write(path, config) == made.space.bytes_(config) == path.stat().st_size
    checks = {check.name: check for check in made.check(path, config)}
    assert all(check.passed for check in checks.values()), checks
    assert checks["transformers"].detail.startswith("skipped") == (kind in NOT_READ_BY_TRANSFORMERS)
    expected = {"llama.cpp tokens", "llama.cpp outputs"} if llamacpp_runtime.installed() else {"llama.cpp"}
    assert checks.keys() == {"audit", "gguf package", "transformers"} | expected


@needs_llamacpp
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
def test_plain_numbers_give_the_same_logits_in_llamacpp(trial: Callable[[str], Trial], kind: str, tmp_path: Path) -> None:
    made = trial(kind)
    made.write(tmp_path / "model.gguf", _everywhere(made, "F32"))
    with torch.inference_mode():
        expected = made.original(TOKENS).logits
    assert (logits(tmp_path / "model.gguf", TOKENS) - expected).abs().max() < 1e-4


@needs_llamacpp
@pytest.mark.parametrize("name", VARIATIONS)
def test_llamacpp_runs_the_same_network(name: str, tmp_path: Path) -> None:
    kind, overrides = VARIATIONS[name]
    made = Trial.of(TARGET, save_tiny(tmp_path / "model", kind, **overrides), ("F32",))
    config = made.space.largest()
    assert made.write(tmp_path / "model.gguf", config) == made.space.bytes_(config)
    with torch.inference_mode():
        expected = made.original(TOKENS).logits
    # llama.cpp looks its gelu up in a table of halves
    tolerance = 1e-4 if kind in ("llama", "qwen2", "phi3") else 5e-2
    assert (logits(tmp_path / "model.gguf", TOKENS) - expected).abs().max() < tolerance


WHOLE, NARROW = (2, 512), (1, 256)
CUTS: dict[str, tuple[list[tuple[int, int]], str]] = {
    "all alike": ([NARROW] * 4, "llama"),
    "all alike, one block less": ([NARROW, (0, 0), NARROW, NARROW], "llama"),
    "without the first block": ([(0, 0), WHOLE, WHOLE, WHOLE], "llama"),
    "as it was": ([WHOLE] * 4, "llama"),
    "different widths and heads": ([WHOLE, (1, 64), (2, 96), (1, 512)], "deci"),
    "much left out": ([(0, 0), (0, 64), (1, 0), (0, 0)], "deci"),
    "nothing left": ([(0, 0)] * 4, "llama"),
    **{
        f"no {half} in block {block}": ([WHOLE] * block + [sizes] + [WHOLE] * (3 - block), "deci")
        for block in (0, 1, 3)
        for half, sizes in (("attention", (0, 512)), ("feed-forward", (2, 0)))
    },
}
"""Groups of heads and channels in each block, and what llama.cpp is told that it is."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(save_tiny(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=4))


def _cut(deep: Checkpoint, blocks: list[tuple[int, int]], names: tuple[str, ...] = ("F32",)) -> tuple[Source, Cut]:
    """The network with the first groups and channels of each block, its matrices in these formats by turns where they can be."""
    model, source = deep.load(), deep.source(list(LLAMA.weights(deep.skeleton())))
    cut(model, LLAMA, [Kept(torch.arange(groups), torch.arange(channels)) for groups, channels in blocks])
    chosen, variants = dict[str, str](), dict[str, torch.Tensor]()
    for weight, name in zip(LLAMA.weights(model), cycle(names), strict=False):
        grid = formats.get(gguf_layout.legal(name, weight.shape))
        if grid.name == "F32":
            continue
        matrix, order = model.get_parameter(weight.name), torch.arange(weight.shape[0])
        if weight.role in ("q", "k"):
            order = gguf_kinds.interleaved(model.config, weight.shape[0])
        data = QUANTIZER.encode(matrix.detach()[order], QUANTIZER.prepare(InputStatistics.unknown(weight.shape[1])), grid).data
        chosen[weight.name], variants[weight.name] = grid.name, data
        with torch.no_grad():
            matrix[order] = grid.decode(data)
    return source, Cut(model, chosen, lambda weight, format_, which=slice(None): variants[weight][which])


@pytest.mark.parametrize("name", CUTS)
def test_networks_with_parts_left_out(deep: Checkpoint, name: str, tmp_path: Path) -> None:
    blocks, arch = CUTS[name]
    source, made = _cut(deep, blocks)
    path = tmp_path / "model.gguf"
    size = TARGET.write_cut(path, source, made)
    assert gguf.GGUFReader(path).get_field("general.architecture").contents() == arch
    checks = {check.name: check for check in TARGET.check_cut(path, source, made, TOKENS)}
    assert all(check.passed for check in checks.values()), checks
    assert checks["transformers"].detail.startswith("skipped") == (arch == "deci")
    most, unneeded = _predicted(source, made, blocks)
    removed = sum((not groups) + (not channels) for groups, channels in blocks)
    if arch == "deci" and all(groups for groups, _ in blocks):
        assert size == most == path.stat().st_size
    else:
        # norms, names, and sizes that are told once
        assert most - unneeded - 2048 * (1 + removed) <= size <= most


def _predicted(source: Source, made: Cut, blocks: list[tuple[int, int]]) -> tuple[int, int]:
    """Bytes as a space counts a config's, tensor by tensor, and how many of these aren't needed, in blocks of nothing."""
    storage, whole = TARGET.storage(source, ["Q8_0"]), source.skeleton()
    stored, _ = passthrough(made.model, ())
    found = structures(whole, LLAMA, LLAMA.weights(whole)).values()
    kept = {structure.reader.name: blocks[structure.reader.block or 0][structure.axis == WIDTH] for structure in found}
    in_place = {structure.reader: storage.instead(structure) for structure in found if not kept[structure.reader.name]}
    unneeded = sum(size for reader, size in in_place.items() if not any(blocks[reader.block or 0]))
    tensors = sum(storage.bytes_(name, tensor.shape, made.formats.get(name, "F32"))[0] for name, tensor in stored.items())
    return storage.fixed_bytes + sum(in_place.values()) + tensors, unneeded


@pytest.mark.parametrize("blocks", [CUTS["different widths and heads"][0], CUTS["all alike"][0], CUTS["much left out"][0]])
def test_what_is_left_is_stored_in_any_format(deep: Checkpoint, blocks: list[tuple[int, int]], tmp_path: Path) -> None:
    for turn in range(3):
        source, made = _cut(deep, blocks, (*TARGET.formats[turn:], *TARGET.formats[:turn]))
        path = tmp_path / f"{turn}.gguf"
        assert TARGET.write_cut(path, source, made) <= _predicted(source, made, blocks)[0]
        checks = TARGET.check_cut(path, source, made, TOKENS)
        assert all(check.passed for check in checks), checks
    flip_bit(path, 0.9)
    assert not all(check.passed for check in TARGET.check_cut(path, source, made, TOKENS))


@needs_llamacpp
def test_a_cut_network_gives_the_same_logits_in_llamacpp(deep: Checkpoint, tmp_path: Path) -> None:
    for blocks, _ in CUTS.values():
        source, made = _cut(deep, blocks)
        path = tmp_path / "model.gguf"
        path.unlink(missing_ok=True)
        TARGET.write_cut(path, source, made)
        with torch.inference_mode():
            expected = made.model(TOKENS, use_cache=False).logits
        assert (logits(path, TOKENS) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "overrides", "reason"),
    [
        ("qwen2", {}, "only for networks like Llama, and this is a qwen2"),
        ("gemma2", {}, "only for networks like Llama, and this is a gemma2"),
        ("llama", {"attention_bias": True}, "its attention has biases"),
        ("llama", {"mlp_bias": True}, "its feed-forwards have biases"),
    ],
)
def test_what_llamacpp_cannot_run_smaller_is_refused(kind: str, overrides: dict[str, Any], reason: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny(tmp_path, kind, **overrides))
    source = checkpoint.source(list(architecture_of(checkpoint.skeleton()).weights(checkpoint.skeleton())))
    with pytest.raises(UserError, match=reason) as error:
        TARGET.storage(source, [])
    assert "onnxruntime" in str(error.value.remedy)


def test_swapped_rows_are_noticed(trial: Callable[[str], Trial], tmp_path: Path) -> None:
    made = trial("llama")
    config = _everywhere(made, "Q8_0")

    def unordered(name: str, format_: str) -> torch.Tensor:
        data = made.variant(name, format_)
        return data.flip(0) if name == "model.layers.1.self_attn.k_proj.weight" else data

    TARGET.write(tmp_path / "model.gguf", made.source, made.space, config, unordered)
    failed = {check.name: check.detail for check in made.check(tmp_path / "model.gguf", config) if not check.passed}
    assert {"gguf package", "transformers"} <= failed.keys()
    assert "k_proj" in failed["gguf package"]


@pytest.mark.parametrize(("place", "name"), [(0.01, "audit"), (0.9, "gguf package")])
def test_one_flipped_bit_is_noticed(trial: Callable[[str], Trial], place: float, name: str, tmp_path: Path) -> None:
    made = trial("llama")
    config = _everywhere(made, "Q4_K")
    made.write(tmp_path / "model.gguf", config)
    flip_bit(tmp_path / "model.gguf", place)
    assert name in {check.name for check in made.check(tmp_path / "model.gguf", config) if not check.passed}


def test_truncated_and_extended_files_are_noticed(trial: Callable[[str], Trial], tmp_path: Path) -> None:
    made = trial("llama")
    config = _everywhere(made, "Q4_0")
    path = tmp_path / "model.gguf"
    made.write(path, config)
    content = path.read_bytes()
    for wrong in (content[:-64], content + bytes(32)):
        path.write_bytes(wrong)
        (audit,) = made.check(path, config)
        assert (audit.name, audit.passed) == ("audit", False)


def test_short_rows_get_the_nearest_format(tmp_path: Path) -> None:
    made = Trial.of(TARGET, save_tiny(tmp_path / "model", "llama", intermediate_size=336, num_hidden_layers=1), ("Q4_K", "Q2_K", "Q8_0"))
    decisions = {d.unit.name: d for d in made.space.decisions}
    odd = decisions["model.layers.0.mlp.down_proj.weight"]
    assert [c.name for c in odd.choices] == ["F16"]
    assert odd.refused["Q4_K"] == "row length 336 is not a multiple of 256; F16 takes its place"
    assert [c.name for c in decisions["model.layers.0.mlp.up_proj.weight"].choices] == ["Q8_0", "Q4_K", "Q2_K"]
    made = Trial.of(TARGET, save_tiny(tmp_path / "other", "llama", intermediate_size=352, num_hidden_layers=1), ("Q4_K", "Q2_K", "Q8_0"))
    odd = next(d for d in made.space.decisions if "down_proj" in d.unit.name)
    assert [c.name for c in odd.choices] == ["Q8_0", "IQ4_NL"]
    config = made.config(0)
    made.write(tmp_path / "model.gguf", config)
    assert all(check.passed for check in made.check(tmp_path / "model.gguf", config))


def test_of_two_16_bit_types_the_nearer_is_kept(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=1)
    for dtype, own, other in (("float32", "F16", "BF16"), ("bfloat16", "BF16", "F16")):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"dtype": dtype}))
        made = Trial.of(TARGET, folder, ("F16", "BF16"))
        assert all([c.name for c in d.choices] == [own] and "nearer" in d.refused[other] for d in made.space.decisions)
        assert Trial.of(TARGET, folder, (other,)).space.uniform(other) is not None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [name for name in TARGET.formats if name.startswith("IQ")])
def test_codebooks_everywhere_embeddings_too(name: str, tied: bool, tmp_path: Path) -> None:
    made = Trial.of(TARGET, save_tiny(tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=tied), (name,))
    config = _everywhere(made, name)
    path = tmp_path / "model.gguf"
    assert made.write(path, config) == made.space.bytes_(config)
    checks = {check.name: check for check in made.check(path, config)}
    assert all(check.passed for check in checks.values()), checks
    assert gguf.GGUFReader(path).get_field("general.file_type").contents() == gguf.LlamaFileType[f"MOSTLY_{name}"]


def test_file_says_what_llamacpp_asks_for(trial: Callable[[str], Trial], tmp_path: Path) -> None:
    made = trial("gemma2")
    made.write(tmp_path / "model.gguf", _everywhere(made, "Q6_K"))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")

    def value(key: str) -> Any:
        return reader.get_field(key).contents()

    assert value("general.architecture") == "gemma2"
    assert value("general.file_type") == gguf.LlamaFileType.MOSTLY_Q6_K
    assert value("gemma2.attention.sliding_window_pattern") == [True, False]
    assert value("gemma2.attn_logit_softcapping") == 50.0
    assert value("tokenizer.ggml.add_bos_token") is False
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}
    norm = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_norm.weight")
    expected = made.original.get_parameter("model.layers.1.pre_feedforward_layernorm.weight") + 1
    assert torch.equal(torch.tensor(norm.data), expected)


@pytest.mark.parametrize(
    ("kind", "overrides", "reason"),
    [
        ("opt", {}, "kind 'opt'"),
        ("llama", {"hidden_act": "gelu"}, "activation is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("qwen3", {"attention_bias": True}, "o_proj.bias"),
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256"),
        ("gemma2", {"final_logit_softcapping": None}, "not capped"),
        ("gpt_neox", {"attention_bias": False}, "no biases"),
    ],
)
def test_what_llamacpp_lacks_is_refused(kind: str, overrides: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=reason):
        Trial.of(TARGET, save_tiny(tmp_path, kind, **overrides), ("F32",))


def _byte_level(*steps: pre_tokenizers.PreTokenizer, ignore_merges: bool, regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = _trained(tokenizer, ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_tokens(["<word>"])
    return tokenizer


def _sentencepiece(prefix: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    return _trained(tokenizer, ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], [])


def _trained(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([tiny_text(1500) + " It's 1234 o'clock, we've 56.7\n\n  and  12\n"] * 2, trainer)
    return tokenizer


def _tokenizers() -> dict[str, Callable[[], Tokenizer]]:
    found: dict[str, Callable[[], Tokenizer]] = {"prefix": lambda: _sentencepiece(True), "no prefix": lambda: _sentencepiece(False)}
    for (steps, whole), name in gguf_tokenizer.SPLITTERS.items():
        splits: list[Any] = []
        for step in steps:
            if step == gguf_tokenizer.DIGIT:
                splits.append(pre_tokenizers.Digits(individual_digits=True))
            elif step != gguf_tokenizer.GPT2:
                splits.append(pre_tokenizers.Split(Regex(step), "isolated"))
        regex = gguf_tokenizer.GPT2 in steps
        found[name] = lambda splits=splits, whole=whole, regex=regex: _byte_level(*splits, ignore_merges=whole, regex=regex)
    return found


@needs_llamacpp
@pytest.mark.parametrize("name", _tokenizers())
def test_llamacpp_tokenises_alike(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=1, vocab_size=520)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizers()[name](), bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    made = Trial.of(TARGET, folder, ("F16",))
    made.write(tmp_path / "model.gguf", made.space.largest())
    texts = [gguf_check.PROBE, tiny_text(60, seed=5), "a <word> b</s>c", " 12345678 x\n\n\n y\t\tz "]
    ids, _ = llamacpp_runtime.run(tmp_path / "model.gguf", texts)
    assert ids == [tokenizer.encode(text) for text in texts]
    if name not in ("prefix", "no prefix"):
        assert gguf.GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.ggml.pre").contents() == name


def test_vocabulary_is_padded_to_the_embedding(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", num_hidden_layers=1, vocab_size=520)
    tiny_tokenizer(512).save_pretrained(folder)
    made = Trial.of(TARGET, folder, ("F16",))
    vocabulary = gguf_tokenizer.read(made.source.tokenizer(), made.source.config)
    assert len(set(vocabulary.tokens)) == 520
    assert vocabulary.types[512:] == [gguf.TokenType.UNUSED] * 8
    made.write(tmp_path / "model.gguf", made.space.largest())
    assert all(check.passed for check in made.check(tmp_path / "model.gguf", made.space.largest()))


def test_tokenizers_that_llamacpp_lacks_are_refused(trial: Callable[[str], Trial]) -> None:
    config = trial("llama").source.config
    unigram = Tokenizer(models.Unigram([("<s>", 0.0), ("a", -1.0)], unk_id=0))
    spaced = _byte_level(ignore_merges=False, regex=True)
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    split = _byte_level(pre_tokenizers.Split(Regex("x+"), "isolated"), ignore_merges=False, regex=False)
    for tokenizer, reason in ((unigram, "Unigram"), (spaced, "space before"), (split, "'x\\+'")):
        with pytest.raises(ModelError, match=reason):
            gguf_tokenizer.read(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"), config)


def test_read_model_gives_the_network_or_says_why_not(trial: Callable[[str], Trial], tmp_path: Path) -> None:
    made = trial("llama")
    config = made.config(3)
    made.write(tmp_path / "llama.gguf", config)
    model, tokenizer = read_model(tmp_path / "llama.gguf")
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, made.extract(config)(TOKENS).logits)
    assert tokenizer.encode(gguf_check.PROBE) == made.source.tokenizer().encode(gguf_check.PROBE)
    other = trial("gemma2")
    other.write(tmp_path / "gemma.gguf", other.space.smallest())
    with pytest.raises(ModelError, match="query_pre_attn_scalar"):
        read_model(tmp_path / "gemma.gguf")
    (tmp_path / "nothing.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(ModelError, match=r"nothing\.gguf can't be read"):
        read_model(tmp_path / "nothing.gguf")


def test_without_llamacpp_the_check_says_that_it_was_skipped(
    trial: Callable[[str], Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp_runtime, "installed", lambda: False)
    made = trial("llama")
    config = _everywhere(made, "Q8_0")
    made.write(tmp_path / "model.gguf", config)
    last = made.check(tmp_path / "model.gguf", config)[-1]
    assert last.passed
    assert last.detail == "skipped: llama-cpp-python is not installed (pip install 'anyfit[llamacpp]')"
    with pytest.raises(RuntimeMissingError, match="llama-cpp-python"):
        logits(tmp_path / "model.gguf", TOKENS)


@needs_llamacpp
def test_a_file_that_kills_llamacpp_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(llamacpp_runtime.LlamaCppError, match="status"):
        logits(tmp_path / "model.gguf", TOKENS)


def test_a_place_that_cannot_be_written_to_is_an_oserror(trial: Callable[[str], Trial], tmp_path: Path) -> None:
    made = trial("llama")
    config = made.space.smallest()
    with pytest.raises(OSError, match="No such file"):
        TARGET.write(tmp_path / "missing" / "model.gguf", made.source, made.space, config, made.variant)
    full = Path("/dev/full")
    if full.exists():
        with pytest.raises(OSError, match="No space left"):
            TARGET.write(full, made.source, made.space, config, made.variant)
