"""GPT-2: fused q, k, v, and Conv1D, which stores (inputs, outputs).

The rows of `c_attn`, as (outputs, inputs), are all of q, then all of k, then all of v. The table of positions
(`wpe`) is kept as it is: it is small, it is added rather than multiplied, and every token reads it.
"""

from anyfit.architectures.base import Architecture
from anyfit.modeling_cut import Layout

GPT2 = Architecture(
    name="gpt2",
    block="transformer.h.{i}",
    inputs=(
        ("attention", {"qkv": "attn.c_attn"}),
        ("attention_output", {"o": "attn.c_proj"}),
        ("feed_forward", {"up": "mlp.c_fc"}),
        ("feed_forward_output", {"down": "mlp.c_proj"}),
    ),
    embedding="transformer.wte",
    head="lm_head",
    layout=Layout(
        "attn",
        "mlp",
        counts={"num_heads": "heads", "split_size": "width", "embed_dim": "width"},
        channels="n_inner",
        norms={"attention": "ln_1", "mlp": "ln_2"},
    ),
)
