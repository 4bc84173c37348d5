"""Llama 1 to 3 and the many networks of its shape."""

from anyfit.architectures.base import Architecture, Inputs
from anyfit.modeling_cut import Layout

GATED: Inputs = (
    ("attention", {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}),
    ("attention_output", {"o": "self_attn.o_proj"}),
    ("feed_forward", {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}),
    ("feed_forward_output", {"down": "mlp.down_proj"}),
)
"""Separate q, k, v and a gated feed-forward: the shape that most of today's networks share."""

LLAMA = Architecture(
    name="llama",
    block="model.layers.{i}",
    inputs=GATED,
    embedding="model.embed_tokens",
    head="lm_head",
    layout=Layout("self_attn", "mlp", norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"}),
)
