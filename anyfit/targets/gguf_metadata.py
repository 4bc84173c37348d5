"""The keys of a GGUF file that describe the network, and the tensors that hold its rotary factors."""

from __future__ import annotations

import math
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from anyfit.targets.gguf_kinds import Kind, block_sizes, head_size, num_kv_heads, rope_parameters, rotary_size


def add_network(writer: gguf.GGUFWriter, config: PretrainedConfig, kind: Kind) -> None:
    """Every size and constant that llama.cpp reads for this kind. No names of files, no times: same network, same bytes."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if (blocks := block_sizes(config)) is None:
        writer.add_feed_forward_length(_feed_forward(config))
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(num_kv_heads(config))
    else:
        writer.add_feed_forward_length([own.channels for own in blocks])
        writer.add_head_count([own.groups * own.heads for own in blocks])
        writer.add_head_count_kv([own.groups for own in blocks])
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_vocab_size(config.vocab_size)
    if kind.layer_norm:
        writer.add_layer_norm_eps(config.layer_norm_epsilon if config.model_type == "gpt2" else config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind.arch is gguf.MODEL_ARCH.GPTNEOX:
        writer.add_parallel_residual(config.use_parallel_residual)
    if kind.window:
        _add_windows(writer, config)
    if kind.rotary:
        _add_rotary(writer, config)


def rotary_tensors(config: PretrainedConfig, kind: Kind) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies, float32 (rotary size / 2,) each, for the scalings that need a table."""
    if not kind.rotary:
        return {}
    parameters = rope_parameters(config)
    if parameters.get("rope_type") == "llama3":
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = parameters["rope_theta"] ** -(torch.arange(0, rotary_size(config), 2, dtype=torch.float32) / rotary_size(config))
        return {"rope_freqs.weight": plain / frequencies}
    if parameters.get("rope_type") == "longrope":
        return {
            f"rope_factors_{span}.weight": torch.tensor(parameters[f"{span}_factor"], dtype=torch.float32) for span in ("long", "short")
        }
    return {}


def _feed_forward(config: PretrainedConfig) -> int:
    named = config.n_inner if config.model_type == "gpt2" else config.intermediate_size
    return named or 4 * config.hidden_size


def _add_windows(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([layer == "sliding_attention" for layer in config.layer_types])
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_rope_freq_base_swa(rope_parameters(config, "sliding_attention")["rope_theta"])


def _add_rotary(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    parameters = rope_parameters(config)
    scaling = parameters.get("rope_type", "default")
    writer.add_rope_dimension_count(rotary_size(config))
    writer.add_rope_freq_base(parameters["rope_theta"])
    if scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    elif scaling == "yarn":
        _add_yarn(writer, config, parameters)
    elif scaling == "longrope":
        _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(attention)


def _add_yarn(writer: gguf.GGUFWriter, config: PretrainedConfig, parameters: dict[str, Any]) -> None:
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    # llama.cpp multiplies by the paper's own attention factor, whatever this key says
    writer.add_rope_scaling_attn_factors(attention / (0.1 * math.log(parameters["factor"]) + 1))
