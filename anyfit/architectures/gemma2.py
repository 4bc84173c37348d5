"""Gemma 2: Llama's matrices, with norms after each half of a block too, and soft-capped scores."""

from dataclasses import replace

from anyfit.architectures.llama import LLAMA
from anyfit.modeling_cut import Layout

NORMED_TWICE = Layout(
    "self_attn",
    "mlp",
    norms={"attention": "input_layernorm", "mlp": "pre_feedforward_layernorm"},
    norms_after={"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"},
)
"""What each half reads, and what it gives."""
GEMMA2 = replace(LLAMA, name="gemma2", layout=NORMED_TWICE)
