"""BERT as an encoder: separate q, k, v with biases, a norm after each half of a block, and no head.

The table of words is only looked up. Tables of positions and of kinds of tokens, and the pooler, which reads the first token alone and
isn't part of what comes out, are kept as they are.
"""

from anyfit.architectures.base import Architecture
from anyfit.modeling_cut import Layout

BERT = Architecture(
    name="bert",
    block="encoder.layer.{i}",
    inputs=(
        ("attention", {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}),
        ("attention_output", {"o": "attention.output.dense"}),
        ("feed_forward", {"up": "intermediate.dense"}),
        ("feed_forward_output", {"down": "output.dense"}),
    ),
    embedding="embeddings.word_embeddings",
    head=None,
    layout=Layout(
        "attention.self", None, head_dim="attention_head_size", counts={"num_attention_heads": "heads", "all_head_size": "width"}
    ),
)
