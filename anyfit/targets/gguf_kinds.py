"""What llama.cpp calls each kind of network, and where it differs from the checkpoint: facts as data.

The facts are those of llama.cpp's loader (`src/models/*.cpp`): the tensors that it reads, how it turns rotary
embeddings, which activation and attention scale are built in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gguf import MODEL_ARCH
from torch import Tensor
from transformers import PretrainedConfig

from anyfit.architectures.llama import LLAMA
from anyfit.modeling_cut import Sizes, stated

Rows = Callable[[PretrainedConfig, int], Tensor]
"""Of a network's matrix with so many rows, its rows in the file's order, as indices into the checkpoint's."""

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
LAYERS = frozenset({"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"})


@dataclass(frozen=True)
class Kind:
    """One kind of network as llama.cpp knows it.

    `activations`: names of the built-in one, as configurations spell it. `biases`: the tensors whose bias the
    loader reads. `rows`: the tensors whose rows stand in another order there, by tensor name. `norm_offset`:
    added to the weights of norms. `head`: whether the output matrix is `shared` with the embedding, its `own`,
    or `either`. `scaling`: the kinds of rotary scaling that it can express. `attention_scale`: the factor on
    the attention scores that is built in, where the configuration could ask for another. `window`: whether
    sliding attention windows exist there. `square`: whether heads times head size must be the hidden size. `reader`: the `model_type` as
    which transformers reads the file, where that isn't its own.
    """

    arch: MODEL_ARCH
    activations: frozenset[str]
    biases: frozenset[str] = frozenset()
    rows: Mapping[str, Rows] = field(default_factory=dict)
    layer_norm: bool = False
    norm_offset: float = 0.0
    head: str = "either"
    rotary: bool = True
    scaling: frozenset[str] = frozenset({"default", "linear", "yarn"})
    attention_scale: Callable[[PretrainedConfig], float] | None = None
    window: bool = False
    square: bool = False
    reader: str | None = None


def kind_of(config: PretrainedConfig) -> Kind:
    """Of a network of a known kind. Where its config says the sizes of each block, they are those of a Llama-shaped one."""
    kind = KINDS[config.model_type]
    return replace(kind, arch=MODEL_ARCH.DECI) if config.is_heterogeneous else kind


def block_sizes(config: PretrainedConfig) -> list[Sizes] | None:
    """Of every block, where the config says them one by one."""
    if not config.is_heterogeneous:
        return None
    assert LLAMA.layout is not None
    return [stated(own, LLAMA.layout) for own in config.per_layer_config]


def head_size(config: PretrainedConfig) -> int:
    """Numbers in one head of the queries."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def num_kv_heads(config: PretrainedConfig) -> int:
    """Heads of the keys and values; as many as queries have where the configuration names none."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def activation(config: PretrainedConfig) -> str:
    """The feed-forward's activation, under whichever name this kind keeps it."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next(str(value) for name in names if (value := getattr(config, name, None)))


def interleaved(config: PretrainedConfig, num_rows: int) -> Tensor:
    """Rotary pairs lie half a head apart in the checkpoint and side by side in the file."""
    return torch.arange(num_rows).view(-1, 2, head_size(config) // 2).transpose(1, 2).reshape(-1)


def concatenated(config: PretrainedConfig, num_rows: int) -> Tensor:
    """The checkpoint has q, k, v of each head together; the file has all q, then all k, then all v."""
    return torch.arange(num_rows).view(-1, 3, head_size(config)).transpose(0, 1).reshape(-1)


def _gemma_scale(num_layers_27b: int) -> Callable[[PretrainedConfig], float]:
    def scale(config: PretrainedConfig) -> float:
        large = config.num_hidden_layers == num_layers_27b
        return 1 / math.sqrt(config.hidden_size // config.num_attention_heads if large else head_size(config))

    return scale


_SILU = frozenset({"silu", "swish"})
_GELU = frozenset({"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"})
_LLAMA = Kind(
    MODEL_ARCH.LLAMA,
    _SILU,
    biases=QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    rows={"attn_q": interleaved, "attn_k": interleaved},
    scaling=frozenset({"default", "linear", "yarn", "llama3"}),
)

KINDS: dict[str, Kind] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, reader="llama"),
    "qwen2": Kind(MODEL_ARCH.QWEN2, _SILU, biases=QKV, square=True),
    "qwen3": Kind(MODEL_ARCH.QWEN3, _SILU, biases=QKV),
    "gemma": Kind(
        MODEL_ARCH.GEMMA,
        _GELU,
        biases=QKV,
        norm_offset=1.0,
        head="shared",
        scaling=frozenset({"default", "linear"}),
    ),
    "gemma2": Kind(
        MODEL_ARCH.GEMMA2,
        frozenset({"gelu_pytorch_tanh"}),
        biases=QKV,
        norm_offset=1.0,
        head="shared",
        attention_scale=_gemma_scale(46),
        window=True,
        scaling=frozenset({"default"}),
    ),
    "gemma3_text": Kind(
        MODEL_ARCH.GEMMA3,
        frozenset({"gelu_pytorch_tanh"}),
        biases=QKV,
        norm_offset=1.0,
        attention_scale=_gemma_scale(62),
        window=True,
        scaling=frozenset({"default", "linear"}),
    ),
    "phi3": Kind(MODEL_ARCH.PHI3, _SILU, square=True, scaling=frozenset({"default", "longrope"})),
    "gpt2": Kind(MODEL_ARCH.GPT2, _GELU, biases=LAYERS, layer_norm=True, rotary=False, square=True),
    "gpt_neox": Kind(
        MODEL_ARCH.GPTNEOX,
        _GELU,
        biases=LAYERS,
        layer_norm=True,
        rows={"attn_qkv": concatenated},
        head="own",
        square=True,
        scaling=frozenset({"default", "linear"}),
    ),
}
"""By the `model_type` of the configuration."""


def refuses(config: PretrainedConfig, kind: Kind) -> str | None:
    """What of this configuration llama.cpp can't express; None where it can express all."""
    size, heads = head_size(config), config.num_attention_heads
    if activation(config) not in kind.activations:
        return f"its activation is {activation(config)!r} and llama.cpp has {', '.join(sorted(kind.activations))} built in"
    if kind.square and size * heads != config.hidden_size:
        return f"its {heads} heads of {size} are not the hidden size {config.hidden_size}, which llama.cpp takes for granted here"
    if kind.rotary and (problem := _refuses_rotary(config, kind)):
        return problem
    if kind.attention_scale and not math.isclose(config.query_pre_attn_scalar**-0.5, kind.attention_scale(config)):
        return f"its query_pre_attn_scalar is {config.query_pre_attn_scalar} and llama.cpp scales by {kind.attention_scale(config):.4f}"
    return _refuses_options(config, kind)


def rope_parameters(config: PretrainedConfig, layers: str = "full_attention") -> dict[str, Any]:
    """Rotary settings of the layers of one type; most networks have a single type."""
    parameters = config.rope_parameters
    return parameters.get(layers, parameters)


def rotary_size(config: PretrainedConfig) -> int:
    """How many numbers of each head are turned."""
    return int(head_size(config) * rope_parameters(config).get("partial_rotary_factor", 1.0))


def window(config: PretrainedConfig) -> int | None:
    """How many tokens back the network attends, where that is bounded."""
    bounded = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if bounded else None


def _refuses_rotary(config: PretrainedConfig, kind: Kind) -> str | None:
    scaling = rope_parameters(config).get("rope_type", "default")
    if scaling not in kind.scaling:
        return f"its rotary scaling {scaling!r} is none of those that llama.cpp has here: {', '.join(sorted(kind.scaling))}"
    if scaling == "yarn" and not _plain_yarn(rope_parameters(config)):
        return "its yarn scaling has other ramps than the paper's, which llama.cpp has built in here"
    if kind.arch is MODEL_ARCH.LLAMA and rotary_size(config) != head_size(config):
        return "it turns only a part of each head, which llama.cpp's llama can't"
    return None


def _plain_yarn(parameters: dict[str, Any]) -> bool:
    return (parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1, parameters.get("truncate", True)) == (32, 1, True)


def _refuses_options(config: PretrainedConfig, kind: Kind) -> str | None:
    if kind.arch is MODEL_ARCH.GEMMA2 and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        return "its logits are not capped, and llama.cpp's gemma2 always caps them"
    if kind.head == "shared" and not config.tie_word_embeddings:
        return "its output matrix is not the embedding, and llama.cpp always shares the two here"
    if kind.arch is MODEL_ARCH.GPT2 and (
        config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights or config.add_cross_attention
    ):
        return "its attention is scaled by layer, unscaled or crossed, and llama.cpp's gpt2 has the plain one only"
    if kind.arch is MODEL_ARCH.GPTNEOX and not config.attention_bias:
        return "its attention has no biases, and llama.cpp's gptneox must have them"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional"
    return None
