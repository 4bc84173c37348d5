"""Opening a model folder: what is read is what transformers reads, and what can't be used is said early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

import anyfit
from anyfit import Family, cli
from anyfit.architectures import architecture_of
from anyfit.checkpoint import Checkpoint
from anyfit.core.errors import FamilyError, ModelError
from anyfit.core.files import sha256, write_json
from anyfit.family.manifest import NAME
from anyfit.interface import interface_of
from anyfit.refinement import refine
from anyfit.testing.models import MODEL_TYPES, save_tiny, tiny_model, tiny_text, tiny_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def shard(folder: Path) -> list[str]:
    """Split the weights over two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(files)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.usefixtures("same_random_state")
def test_equals_from_pretrained(model_type: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / model_type, model_type)
    with torch.inference_mode():
        original = type(tiny_model(model_type)).from_pretrained(folder, dtype=torch.float32).eval()
        interface = interface_of(original.config)
        tokens = interface.example(original.config, 2, 20)
        expected = interface(original, tokens)
        capfd.readouterr()
        checkpoint = Checkpoint.open(folder)
        loaded = checkpoint.load()
        assert torch.equal(interface(loaded, tokens), expected)
        weights = list(architecture_of(checkpoint.skeleton()).weights(checkpoint.skeleton()))
        source = checkpoint.source(weights)
        rebuilt = source.build({weight.name: checkpoint.read(weight.name) for weight in weights})
        assert torch.equal(interface(rebuilt, tokens), expected)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert source.passthrough.keys() | {w.name for w in weights} == checkpoint.tensors().keys()
    assert not checkpoint.unused
    if loaded.can_generate():
        assert rebuilt.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert capfd.readouterr() == ("", "")


def test_ties_are_restored(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny(tmp_path / "tied", tie_word_embeddings=True))
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in checkpoint.tensors()
    model = checkpoint.source([]).build({})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight"))


def test_a_tied_tensor_may_be_stored_under_its_other_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    before = Checkpoint.open(folder).load()
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), before.lm_head.weight)
    assert torch.equal(checkpoint.load().model.embed_tokens.weight, before.lm_head.weight)


def test_a_tied_tensor_stored_twice_must_agree(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tied", tie_word_embeddings=True)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert not Checkpoint.open(folder).unused
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        Checkpoint.open(folder)


def test_names_without_the_base_prefix(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "gpt2")
    expected = Checkpoint.open(folder).load()
    rewrite(folder, lambda tensors: [tensors.update({n.removeprefix("transformer."): tensors.pop(n)}) for n in list(tensors)])
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors().keys() == {name for name, _ in expected.named_parameters()}
    tokens = torch.arange(10)[None]
    assert torch.equal(checkpoint.load()(tokens).logits, expected(tokens).logits)


def test_shards_read_like_one_file(folder: Path) -> None:
    whole = Checkpoint.open(folder)
    expected = {name: whole.read(name).clone() for name in whole.tensors()}
    shard(folder)
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.files) == 2
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_stored_type_and_size(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items() if t.ndim == 2}))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.bytes_ == (folder / WEIGHTS).stat().st_size
    assert checkpoint.tensors()["model.norm.weight"] == (torch.Size([256]), torch.float32)
    assert checkpoint.load().dtype == torch.float32


def test_a_model_built_leaves_the_source_alone(tiny_llama_folder: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama_folder)
    source, stored = checkpoint.source([]), checkpoint.digest
    before = {name: tensor.clone() for name, tensor in source.passthrough.items()}
    for model in (source.build({}), checkpoint.load()):
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(source.passthrough[name], tensor) for name, tensor in before.items())
    assert Checkpoint.open(tiny_llama_folder).digest == stored


def test_digest_follows_the_content_not_the_place(tiny_llama_folder: Path, folder: Path) -> None:
    expected = Checkpoint.open(tiny_llama_folder).digest
    assert Checkpoint.open(folder).digest == expected
    (folder / "README.md").write_text("not part of the model")
    assert Checkpoint.open(folder).digest == expected
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert Checkpoint.open(folder).digest != expected


def test_travelling_files(folder: Path) -> None:
    for name in ("chat_template.jinja", "merges.txt", "modeling_own.py", "README.md"):
        (folder / name).write_text("x")
    plain = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"}
    assert {path.name for path in Checkpoint.open(folder).travelling_files()} == plain
    trusted = Checkpoint.open(folder, trust_remote_code=True)
    assert {path.name for path in trusted.travelling_files()} == plain | {"modeling_own.py"}


def test_tensors_that_nobody_uses_are_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}))
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32)}))
    assert Checkpoint.open(folder).unused == ("model.layers.9.mlp.up_proj.weight",)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(folder: Path, value: float) -> None:
    Checkpoint.open(folder).check_finite()
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 5:7].fill_(value))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in model\.safetensors holds 2 values"):
        Checkpoint.open(folder).check_finite()


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def only_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def lose_a_shard(folder: Path) -> None:
    (folder / shard(folder)[1]).unlink()


def truncate_a_shard(folder: Path) -> None:
    path = folder / shard(folder)[1]
    path.write_bytes(path.read_bytes()[:1000])


def escape_the_folder(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}')


def as_bert(folder: Path) -> None:
    shutil.rmtree(folder)
    BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    ).save_pretrained(folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (shutil.rmtree, "There is no folder"),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "is empty"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "no model_type": (lambda f: (f / "config.json").write_text("{}"), "no model_type"),
    "unknown model_type": (lambda f: configure(f, model_type="frobnicator"), "frobnicator"),
    "impossible config": (lambda f: configure(f, num_hidden_layers="many"), "config.json can't be used"),
    "remote code": (lambda f: configure(f, model_type="own", auto_map={"AutoConfig": "own.Own"}), "trust_remote_code"),
    "quantised": (lambda f: configure(f, quantization_config={"quant_method": "gptq", "bits": 4}), "quantised already"),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].char()})),
        "quantised already: lm_head.weight",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no weights"),
    "pickles": (only_pickles, "pytorch_model.bin.*save_pretrained"),
    "truncated": (truncate, r"model\.safetensors is truncated"),
    "emptied": (lambda f: (f / WEIGHTS).write_bytes(b""), r"model\.safetensors is truncated"),
    "trailing bytes": (lambda f: (f / WEIGHTS).open("ab").write(b"x"), r"model\.safetensors is truncated or damaged"),
    "shard lost": (lose_a_shard, r"lacks weight files.*model-2\.safetensors"),
    "shard truncated": (truncate_a_shard, r"model-2\.safetensors is truncated"),
    "shard outside": (escape_the_folder, "no file of its own folder"),
    "tensor lost": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), r"lacks tensors.*model\.norm\.weight"),
    "wrong shape": (lambda f: configure(f, intermediate_size=256), r"mlp\.gate_proj\.weight is \[512, 256\], not \[256, 256\]"),
    "not causal": (as_bert, "is a bert of another kind"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_opened(folder: Path, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(ModelError, match=message) as caught:
        Checkpoint.open(folder)
    assert caught.value.remedy


def test_a_file_is_no_folder(tiny_llama_folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        Checkpoint.open(tiny_llama_folder / WEIGHTS)


def test_only_hub_ids_go_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("./model", "~/model", "/models/mine", "models/mine/latest", "model", Path("models/mine")):
        with pytest.raises(ModelError, match="There is no folder"):
            Checkpoint.open(name)
    assert not asked
    with pytest.raises(ModelError, match=r"neither a folder nor .* \(no route\)"):
        Checkpoint.open("models/mine")
    assert asked == ["models/mine"]


def test_the_hub_is_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="neither a folder nor a model that can be reached"):
        Checkpoint.open("nobody/nothing")


def test_tokenizer(folder: Path) -> None:
    assert len(Checkpoint.open(folder).tokenizer()) == 512
    tiny_tokenizer(300).save_pretrained(folder)
    assert len(Checkpoint.open(folder).tokenizer()) == 300
    tiny_tokenizer(600).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"600 tokens.*512 rows"):
        Checkpoint.open(folder).tokenizer()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="can't be used"):
        Checkpoint.open(folder).tokenizer()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        Checkpoint.open(folder).tokenizer()


def test_a_token_that_a_tokenizer_class_adds_by_itself_is_no_mismatch(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "qwen2", "qwen2")
    assert Checkpoint.open(folder).tokenizer()("a b")["input_ids"]


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder comes with its own code, which is copied there when it is run."""
    cache = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    (folder / "own.py").write_text(CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    configure(folder, model_type="own-llama", auto_map=auto_map, architectures=["OwnForCausalLM"])
    return cache


def test_remote_code_runs_only_for_who_trusts_it(folder: Path, tiny_llama_folder: Path, cache: Path) -> None:
    tokens = torch.arange(9)[None]
    expected = Checkpoint.open(tiny_llama_folder).load()(tokens).logits
    with pytest.raises(ModelError, match="comes with its own code"):
        Checkpoint.open(folder)
    assert not cache.exists()
    model = Checkpoint.open(folder, trust_remote_code=True).load()
    assert type(model).__name__ == "OwnForCausalLM"
    assert torch.equal(model(tokens).logits, expected)


def test_a_familys_code_runs_only_for_who_trusts_it(folder: Path, cache: Path, tmp_path: Path) -> None:
    """It may come from someone else."""
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    wishes = {"data": text, "target": "transformers", "formats": ("F32", "int8_sym"), "recipe": "rtn", "length": 32, "segments": 16}
    made = anyfit.fit(folder, output=tmp_path / "own.family", trust_remote_code=True, **wishes)  # type: ignore[arg-type]
    assert type(made.extract("int8_sym")).__name__ == "OwnForCausalLM"
    shutil.rmtree(cache)
    family, out = Family.open(made.path), tmp_path / "out"
    evaluate = partial(anyfit.evaluate, made.path)
    for take in (family.extract, partial(family.export, path=out), partial(refine, family, model=folder), lambda b: evaluate(budget=b)):
        with pytest.raises(FamilyError, match="is Python code of the original"):
            take("int8_sym")
    arguments = ["extract", str(made.path), "--budget", "int8_sym", "-o", str(out)]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2
    assert not cache.exists() and not out.exists()
    assert CliRunner().invoke(cli.app, [*arguments, "--trust-remote-code"]).exit_code == 0
    assert cache.exists() and out.exists()
    trusting = Family.open(made.path, trust_remote_code=True)
    trusting.reload()
    assert all(check.passed for check in trusting.export("int8_sym", tmp_path / "exported").checks)
    assert evaluate(budget="int8_sym", trust_remote_code=True).quality.perplexity > 1


def test_a_family_that_hides_its_code_runs_none(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Whether there is code isn't what its manifest says."""
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(20)), encoding="utf-8")
    wishes = {"data": text, "target": "transformers", "formats": ("F32", "int8_sym"), "recipe": "rtn", "length": 32, "segments": 16}
    family = anyfit.fit(tiny_llama_folder, output=tmp_path / "plain.family", trust_remote_code=True, **wishes)  # type: ignore[arg-type]
    assert family.manifest.trust_remote_code and Family.open(family.path).extract("int8_sym"), "there is none, so that none runs"
    (family.path / "source" / "own.py").write_text(CODE)
    files = {**family.manifest.files, "source/own.py": sha256(family.path / "source" / "own.py")}
    write_json(family.path / NAME, replace(family.manifest, files=files, trust_remote_code=False).to_json())
    with pytest.raises(FamilyError, match=r"own\.py is Python code of the original"):
        Family.open(family.path).extract("int8_sym")
