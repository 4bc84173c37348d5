"""Cut networks: what is refused, what is saved, and what another process reads back. That cutting is exact is in the conformance suite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of, architectures
from anyfit.checkpoint import Checkpoint
from anyfit.core.errors import ModelError
from anyfit.modeling_cut import NoAttention
from anyfit.structure.cutting import Kept, cut, sizes
from anyfit.structure.levels import LARGE_STEP, STEP, widths
from anyfit.targets import onnx_graph
from anyfit.targets.transformers import write_cut
from anyfit.testing.models import save_tiny, tiny_model

NOTHING = torch.arange(0)
TOKENS = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(0))
READ = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
asked = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
for case in map(Path, sys.argv[1:]):
    print("begin", file=sys.stderr)
    trust = (case / "cut/modeling_cut.py").is_file()
    tokens = load_file(case / "tokens.safetensors")["tokens"]
    model, info = AutoModelForCausalLM.from_pretrained(case / "cut", trust_remote_code=trust, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    written = {name: model.generate(tokens, use_cache=cache, **asked) for name, cache in (("quickly", True), ("slowly", False))}
    print("read", file=sys.stderr)
    model.save_pretrained(case / "again")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(case / "again", trust_remote_code=trust)(tokens).logits
    save_file({"logits": logits, "again": again, **written}, case / "read.safetensors")
    size = sum(parameter.numel() for parameter in model.parameters())
    report = {"class": type(model).__name__, "info": {k: sorted(map(str, v)) for k, v in info.items() if v}, "size": size}
    (case / "read.json").write_text(json.dumps(report))
assert "anyfit" not in sys.modules
"""
CASES: dict[str, tuple[str, list[Kept]]] = {
    **{
        kind: (kind, [Kept(NOTHING, torch.arange(0, 512, 3)), Kept(torch.tensor([1]), NOTHING)])
        for kind in ("llama", "gpt2", "phi3", "opt")
    },
    **{f"{kind} alike": (kind, [Kept(torch.tensor([i]), torch.arange(0, 512, 2)) for i in (0, 1)]) for kind in ("llama", "qwen3", "phi3")},
}


def every(number: int, step: int) -> Tensor:
    return torch.arange(0, number, step)


def written(folder: Path, kind: str, kept: list[Kept], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Save a tiny network's folder, cut it, and write what is left to `folder / "cut"`."""
    original = Checkpoint.open(save_tiny(folder / "whole", kind))
    model = original.load()
    architecture = architecture_of(model)
    source = original.source(architecture.weights(model))
    cut(model, architecture, kept)
    size = write_cut(folder / "cut", source, model, dtype)
    assert size == sum(file.stat().st_size for file in (folder / "cut").glob("*.safetensors"))
    return model


def test_what_is_written_comes_back_in_another_process(tmp_path: Path) -> None:
    models = {case: written(tmp_path / case, kind, kept) for case, (kind, kept) in CASES.items()}
    for case in CASES:
        save_file({"tokens": TOKENS}, tmp_path / case / "tokens.safetensors")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", READ, *(str(tmp_path / case) for case in CASES)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    assert not any("per-layer attribute" in case.partition("read\n")[0] for case in ran.stderr.split("begin\n")), "reading warns"
    for case, model in models.items():
        report, found = json.loads((tmp_path / case / "read.json").read_text()), load_file(tmp_path / case / "read.safetensors")
        alike = "alike" in case
        assert report["class"] == ("" if alike else "Cut") + type(model).__name__ and not report["info"], report
        assert report["size"] == sum(parameter.numel() for parameter in model.parameters())
        with torch.no_grad():
            assert (model(TOKENS).logits - found["logits"]).abs().max() <= 1e-5, case
        assert torch.equal(found["again"], found["logits"]), f"{case}: saved once more by transformers"
        assert torch.equal(found["quickly"], found["slowly"]), case
        files = {file.name for file in (tmp_path / case / "cut").iterdir()}
        assert "tokenizer.json" in files and ("modeling_cut.py" in files) != alike
        if not alike:
            config = json.loads((tmp_path / case / "cut/config.json").read_text())["per_layer_config"]
            assert config["0"]["skip"] == ["attention"] and config["1"]["skip"] == ["mlp"]


def test_what_its_class_cannot_say_is_written_block_by_block(tmp_path: Path) -> None:
    """GPT-2's heads are as wide as the network over their number, so that fewer of them aren't the config's to say."""
    written(tmp_path, "gpt2", [Kept(torch.tensor([0, 2])), Kept(torch.tensor([1, 3]))])
    assert (tmp_path / "cut/modeling_cut.py").is_file()
    again = Checkpoint.open(tmp_path / "cut", trust_remote_code=True).load()
    assert [own.heads * own.groups for own in sizes(again, architectures.get("gpt2"))] == [2, 2]
    with pytest.raises(ModelError, match="its own code"):
        Checkpoint.open(tmp_path / "cut")


def test_narrower_feed_forwards_alone_are_ordinary_for_all(tmp_path: Path) -> None:
    written(tmp_path, "gpt2", [Kept(channels=every(512, 2)), Kept(channels=every(512, 2))], torch.bfloat16)
    config = json.loads((tmp_path / "cut/config.json").read_text())
    assert config["n_inner"] == 256 and config["dtype"] == "bfloat16" and "auto_map" not in config


def test_cutting_again_goes_on_from_what_is_left() -> None:
    model, once = tiny_model("llama", num_key_value_heads=4), tiny_model("llama", num_key_value_heads=4)
    architecture = architecture_of(model)
    cut(model, architecture, [Kept(torch.tensor([0, 2, 3]), every(512, 2)), Kept()])
    cut(model, architecture, [Kept(torch.tensor([1, 2]), every(256, 2)), Kept(groups=NOTHING)])
    cut(once, architecture, [Kept(torch.tensor([2, 3]), every(512, 4)), Kept(groups=NOTHING)])
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, once(TOKENS).logits)
    assert model.config.to_dict() == once.config.to_dict()


def test_a_cut_network_is_described_without_what_it_lost() -> None:
    model = tiny_model("opt")
    architecture = architecture_of(model)
    names = [weight.name for weight in architecture.weights(model)]
    cut(model, architecture, [Kept(NOTHING, NOTHING), Kept()])
    left = [weight.name for weight in architecture.weights(model)]
    assert set(names) - set(left) == {name for name in names if ".layers.0." in name}
    assert "model.decoder.layers.0.self_attn.out_proj.bias" in model.state_dict(), "biases keep their names"


def test_on_meta_only_shapes_are_cut() -> None:
    with torch.device("meta"):
        skeleton = type(tiny_model("llama"))(tiny_model("llama").config)
    real, kept = tiny_model("llama"), [Kept(torch.tensor([1]), every(512, 5)), Kept(groups=NOTHING)]
    for model in (skeleton, real):
        cut(model, architecture_of(model), kept)
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_what_is_removed_costs_no_memory_for_its_numbers() -> None:
    model = tiny_model("llama")
    cut(model, architecture_of(model), [Kept(groups=NOTHING), Kept()])
    attention = model.get_submodule("model.layers.0.self_attn")
    assert isinstance(attention, NoAttention) and not list(attention.parameters())
    hidden = torch.randn(2, 5, 256)
    assert attention(hidden)[0].numel() == 1, "a zero, for all tokens"


class Operations(TorchDispatchMode):
    """What torch computes while this lasts, by name; views aren't counted."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.ran[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "phi3"])
def test_a_removed_block_computes_nothing(kind: str) -> None:
    """Against the same network without that block: two additions, and no norm."""
    model, shorter = tiny_model(kind), tiny_model(kind, num_hidden_layers=1)
    architecture = architecture_of(model)
    cut(model, architecture, [Kept(), Kept(NOTHING, NOTHING)])
    block = architecture.block.format(i=1)
    assert all(name.endswith("bias") and parameter.ndim == 1 for name, parameter in model.get_submodule(block).named_parameters())
    with torch.no_grad(), Operations() as ran:
        model(TOKENS, use_cache=False)
    with torch.no_grad(), Operations() as less:
        shorter(TOKENS, use_cache=False)
    more = ran.ran - less.ran
    assert more.pop("add", 0) <= 2 and more.pop("new_zeros", 0) <= 2
    assert set(more) <= ({"relu", "clone", "dropout", "native_dropout"} if kind == "opt" else set()), more


def test_a_removed_block_leaves_nothing_in_a_graph() -> None:
    pytest.importorskip("onnxscript")
    graphs = []
    for model, kept in ((tiny_model("llama"), [Kept(), Kept(NOTHING, NOTHING)]), (tiny_model("llama", num_hidden_layers=1), [Kept()])):
        graphs.append(Counter(node.op_type for node in onnx_graph.export(cut(model, architecture_of(model), kept)).nodes))
    more = graphs[0] - graphs[1]
    assert set(more) <= {"Add", "ConstantOfShape"} and more.total() <= 3, more  # a zero, added twice


def test_an_unknown_kind_is_refused_with_its_name() -> None:
    model = tiny_model("stablelm", num_key_value_heads=2, intermediate_size=512)
    with pytest.raises(ModelError, match="'stablelm' can't be cut"):
        cut(model, architecture_of(model), [Kept(), Kept()])


@pytest.mark.parametrize("groups", [torch.tensor([1, 0]), torch.tensor([2]), torch.tensor([0.0])])
def test_indices_must_be_of_the_block_and_rising(groups: Tensor) -> None:
    model = tiny_model("llama")
    with pytest.raises(AssertionError):
        cut(model, architecture_of(model), [Kept(groups=groups), Kept()])


def test_modes_and_gradients_are_kept() -> None:
    model = tiny_model("llama").train()
    model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    cut(model, architecture_of(model), [Kept(torch.tensor([0]), every(512, 2)), Kept(NOTHING)])
    assert all(module.training for module in model.modules())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["model.layers.0.mlp.up_proj.weight"]
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


def test_widths_fall_geometrically_in_whole_steps() -> None:
    ladder = widths(2816)
    assert ladder[0] == 2816 and ladder[-1] == STEP
    assert all(width % STEP == 0 for width in ladder)
    assert all(0.8 <= small / large <= 0.95 for large, small in pairwise(ladder) if small >= 10 * STEP)
    assert widths(40) == [40, 32] and widths(20) == [20]
    assert sum(width % LARGE_STEP == 0 for width in ladder) >= 7 and all(width % LARGE_STEP == 0 for width in widths(11008)[:14])
