"""ViT with its classifier: separate q, k, v with biases, a norm before each half of a block.

What makes patches is a convolution, and the table of positions and the position for the class are added: all are kept as they are. The
classifier reads that position alone.
"""

from anyfit.architectures.base import Architecture
from anyfit.modeling_cut import Layout

VIT = Architecture(
    name="vit",
    block="vit.layers.{i}",
    inputs=(
        ("attention", {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj"}),
        ("attention_output", {"o": "attention.o_proj"}),
        ("feed_forward", {"up": "mlp.fc1"}),
        ("feed_forward_output", {"down": "mlp.fc2"}),
    ),
    embedding=None,
    head=None,
    after={"classifier": "classifier"},
    layout=Layout("attention", "mlp", counts={"num_attention_heads": "heads"}),
)
