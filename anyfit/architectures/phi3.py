"""Phi-3 and Phi-4: fused q, k, v (all of q, then k, then v) and fused gate and up (all of gate, then up)."""

from dataclasses import replace

from anyfit.architectures.llama import LLAMA
from anyfit.modeling_cut import Layout

PHI3 = replace(
    LLAMA,
    name="phi3",
    inputs=(
        ("attention", {"qkv": "self_attn.qkv_proj"}),
        ("attention_output", {"o": "self_attn.o_proj"}),
        ("feed_forward", {"gate_up": "mlp.gate_up_proj"}),
        ("feed_forward_output", {"down": "mlp.down_proj"}),
    ),
    layout=Layout(
        "self_attn",
        "mlp",
        counts={"num_key_value_heads": "groups"},
        reads_config=True,
        norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    ),
)
