"""OPT: separate q, k, v and a plain feed-forward.

Where the embedding is narrower than the network (350M), one projection widens it on the way in and another
narrows the last hidden state for the tied head. The learned positions are kept as they are.
"""

from anyfit.architectures.base import Architecture
from anyfit.modeling_cut import Layout

OPT = Architecture(
    name="opt",
    block="model.decoder.layers.{i}",
    inputs=(
        ("attention", {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}),
        ("attention_output", {"o": "self_attn.out_proj"}),
        ("feed_forward", {"up": "fc1"}),
        ("feed_forward_output", {"down": "fc2"}),
    ),
    embedding="model.decoder.embed_tokens",
    head="lm_head",
    before={"project_in": "model.decoder.project_in"},
    after={"project_out": "model.decoder.project_out"},
    layout=Layout(
        "self_attn",
        None,
        counts={"num_heads": "heads"},
        channels="ffn_dim",
        norms={"attention": "self_attn_layer_norm", "mlp": "final_layer_norm"},
        norms_first="do_layer_norm_before",
    ),
)
