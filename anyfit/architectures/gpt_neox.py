"""GPT-NeoX and Pythia: fused q, k, v whose rows alternate by head (q, k, v of head 0, then of head 1, ...).

The feed-forward reads a norm of its own even where it runs in parallel with the attention.
"""

from anyfit.architectures.base import Architecture
from anyfit.modeling_cut import Layout

GPT_NEOX = Architecture(
    name="gpt_neox",
    block="gpt_neox.layers.{i}",
    inputs=(
        ("attention", {"qkv": "attention.query_key_value"}),
        ("attention_output", {"o": "attention.dense"}),
        ("feed_forward", {"up": "mlp.dense_h_to_4h"}),
        ("feed_forward_output", {"down": "mlp.dense_4h_to_h"}),
    ),
    embedding="gpt_neox.embed_in",
    head="lm_head",
    layout=Layout(
        "attention", "mlp", by_group=True, head_dim="head_size", norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
    ),
)
