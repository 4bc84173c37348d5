"""Every description, on a tiny random model of the real class, through the conformance suite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from anyfit.architectures import architecture_of, architectures
from anyfit.architectures.base import Architecture
from anyfit.architectures.coverage import passthrough, uncovered
from anyfit.architectures.generic import describe
from anyfit.architectures.llama import LLAMA
from anyfit.core.errors import ModelError
from anyfit.interface import interface_of
from anyfit.testing.architectures import CHECKS, check_inputs_are_shared_as_described, check_order_is_of_execution
from anyfit.testing.models import MODEL_TYPES, save_tiny, tiny_model, tiny_text, tiny_tokenizer

Fields = tuple[tuple[str, Any], ...]
UNKNOWN: dict[str, Fields] = {
    "bloom": (),
    "falcon": (),
    "gptj": (("rotary_dim", 64),),
    "mixtral": (("intermediate_size", 256), ("num_key_value_heads", 2), ("num_local_experts", 4)),
    "stablelm": (("num_key_value_heads", 2), ("intermediate_size", 512)),
}
CASES = [
    *((kind, (("tie_word_embeddings", tied),)) for kind in MODEL_TYPES for tied in (False, True)),
    ("opt", (("word_embed_proj_dim", 128),)),
    ("gpt_neox", (("use_parallel_residual", False),)),
    *UNKNOWN.items(),
]


@cache
def model_of(kind: str, fields: Fields = ()) -> PreTrainedModel:
    return tiny_model(kind, **dict(fields))


def test_every_registered_kind_has_a_tiny_model() -> None:
    assert set(architectures) == set(MODEL_TYPES)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("kind", "fields"), CASES, ids=str)
def test_conformance(kind: str, fields: Fields, check: Callable[[Architecture, PreTrainedModel], None], same_random_state: None) -> None:
    model = model_of(kind, fields)
    check(architecture_of(model), model)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_known_kinds_decide_every_linear_layer(kind: str) -> None:
    model = model_of(kind)
    architecture = architecture_of(model)
    assert not architecture.generic and not architecture.note and architecture.name == kind
    tables = {
        "gpt2": {"transformer.wpe.weight"},
        "opt": {"model.decoder.embed_positions.weight"},
        "vit": {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "vit.embeddings.patch_embeddings.projection.weight"},
        "bert": {"embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight", "pooler.dense.weight"},
    }
    assert uncovered(model, architecture.weights(model)).keys() == tables.get(kind, set())


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_one_weight(tied: bool) -> None:
    model = model_of("llama", (("tie_word_embeddings", tied),))
    architecture = architecture_of(model)
    weights = {weight.role: weight for weight in architecture.weights(model) if weight.block is None}
    embedding = weights["embedding"]
    if tied:
        assert weights.keys() == {"embedding"}
        assert embedding.input == "head" and embedding.tied == ("lm_head.weight",) and architecture.hook_path(embedding) == "lm_head"
    else:
        assert embedding.input is None and architecture.hook_path(embedding) is None
        assert weights["head"].input == "head" and architecture.hook_path(weights["head"]) == "lm_head"


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_kind_is_described_aloud_and_alike_on_meta(kind: str) -> None:
    model = model_of(kind, UNKNOWN[kind])
    architecture = architecture_of(model)
    assert architecture.generic and repr(kind) in architecture.note and "trial run stopped" not in architecture.note
    with torch.device("meta"):
        assert architecture_of(type(model)(copy.deepcopy(model.config))) == architecture


def test_parallel_halves_of_a_block_share_their_input() -> None:
    model = model_of("gptj", UNKNOWN["gptj"])
    shared = {weight.role for weight in architecture_of(model).weights(model) if weight.input == "transformer.h.0.attn.q_proj"}
    assert shared == {"attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"}


def test_stacked_experts_are_reported() -> None:
    model = model_of("mixtral", UNKNOWN["mixtral"])
    reasons = uncovered(model, architecture_of(model).weights(model))
    assert "stack of 4 matrices" in reasons["model.layers.0.mlp.experts.gate_up_proj"]
    assert "MixtralTopKRouter" in reasons["model.layers.1.mlp.gate.weight"]


def test_a_description_by_looking_agrees_with_the_known_one() -> None:
    model = model_of("llama")
    known, found = architecture_of(model), describe(model)
    assert [(w.name, w.shape, w.tied) for w in found.weights(model)] == [(w.name, w.shape, w.tied) for w in known.weights(model)]
    assert _partition(found, model) == _partition(known, model)


def _partition(architecture: Architecture, model: PreTrainedModel) -> set[frozenset[str]]:
    inputs: dict[str | None, set[str]] = {}
    for weight in architecture.weights(model):
        inputs.setdefault(weight.input, set()).add(weight.name)
    return {frozenset(names) for names in inputs.values()}


class _Config(PreTrainedConfig):
    model_type = "made_up"


class _MadeUp(PreTrainedModel):
    """A network with Linear layers before and after its blocks."""

    config_class = _Config

    def __init__(self, config: _Config, block: Callable[[], nn.Module]) -> None:
        super().__init__(config)
        self.table = nn.Embedding(16, 8)
        self.project = nn.Linear(8, 8)
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.final = nn.Linear(8, 16)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.final


class _WithoutMatrices(_MadeUp):
    def __init__(self, config: _Config) -> None:
        super().__init__(config, lambda: nn.LayerNorm(8))


class _Stops(_MadeUp):
    def __init__(self, config: _Config) -> None:
        super().__init__(config, lambda: nn.Sequential(nn.Linear(8, 8)))

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        hidden = self.layers[0](self.project(self.table(input_ids)))
        logits: torch.Tensor = self.final(hidden if hidden.sum().item() else -hidden)
        return logits


def test_blocks_without_matrices_are_an_error() -> None:
    with pytest.raises(ModelError, match="_WithoutMatrices has no blocks with Linear layers"):
        architecture_of(_WithoutMatrices(_Config()))


def test_a_trial_run_that_stops_is_told_and_loses_nothing() -> None:
    model = _Stops(_Config())
    architecture = architecture_of(model)
    assert "trial run stopped (RuntimeError" in architecture.note and "3 were not seen to run" in architecture.note
    assert [weight.name for weight in architecture.weights(model)] == [
        "table.weight",
        "project.weight",
        *(f"layers.{i}.0.weight" for i in range(3)),
        "final.weight",
    ]


def test_another_class_of_a_known_kind_is_an_error_that_names_the_module() -> None:
    with pytest.raises(ModelError, match="has no module lm_head"):
        list(LLAMA.weights(model_of("llama").model))


def test_the_suite_notices_wrong_descriptions() -> None:
    model = model_of("llama")
    merged = (("attention", {**LLAMA.inputs[0][1], "o": "self_attn.o_proj"}), *LLAMA.inputs[2:])
    with pytest.raises(AssertionError, match=r"o_proj.weight doesn't read"):
        check_inputs_are_shared_as_described(replace(LLAMA, inputs=merged), model)
    split = (*((role, {role: path}) for role, path in LLAMA.inputs[0][1].items()), *LLAMA.inputs[1:])
    with pytest.raises(AssertionError, match="are the same numbers"):
        check_inputs_are_shared_as_described(replace(LLAMA, inputs=split), model)
    with pytest.raises(AssertionError, match="described"):
        check_order_is_of_execution(replace(LLAMA, inputs=LLAMA.inputs[::-1]), model)


def test_stored_buffers_are_kept() -> None:
    model = copy.deepcopy(model_of("llama"))
    model.model.layers[0].register_buffer("statistic", torch.ones(3))
    kept, _ = passthrough(model, LLAMA.weights(model))
    assert torch.equal(kept["model.layers.0.statistic"], torch.ones(3))


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_tiny_models_come_back_from_disk(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / kind, kind, seed=3)
    original = tiny_model(kind, seed=3)
    interface = interface_of(original.config)
    tokens = interface.example(original.config, 2, 20)
    if interface.words:
        tokens = AutoTokenizer.from_pretrained(folder)(tiny_text(20), return_tensors="pt").input_ids
    with torch.no_grad():
        loaded = type(original).from_pretrained(folder)
        loaded, made, other = (interface(model, tokens) for model in (loaded, original, model_of(kind)))
    assert torch.equal(loaded, made) and not torch.equal(loaded, other)


def test_tiny_tokenizer_reads_anything() -> None:
    tokenizer = tiny_tokenizer()
    text = "Bada ñandú \t\n 你好 \x00 " + tiny_text(30)
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens) == text and len(tokenizer) == 512
    assert len(tokenizer(tiny_text(30)).input_ids) < len(tiny_text(30)) * 0.8
