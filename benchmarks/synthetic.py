"""A Llama of any size with random, well-scaled weights, written shard by shard: what memory and time are measured on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from anyfit.testing.models import tiny_tokenizer

BLOCKS_A_SHARD = 6


@dataclass(frozen=True)
class Shape:
    """`width` of the residual stream; the feed-forward part is 2.75 times as wide, heads are 64 wide, 8 share keys and values."""

    width: int
    num_blocks: int
    vocabulary: int = 32000

    @property
    def config(self) -> LlamaConfig:
        heads = self.width // 64
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.num_blocks,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 8),
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )


def write(shape: Shape, folder: Path) -> Path:
    """A folder of bfloat16 shards with an index, and a small tokenizer. One shard is in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(shape))
    places: dict[str, str] = {}
    total = 0
    for number, sizes in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {key: _random(key, size, shape.num_blocks) for key, size in sizes.items()}
        total += sum(2 * tensor.numel() for tensor in tensors.values())
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shape.config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and sizes of each shard's tensors."""
    config, width = shape.config, shape.width
    inner, shared = config.intermediate_size, config.num_key_value_heads * 64
    yield {"model.embed_tokens.weight": (shape.vocabulary, width)}
    block = {
        "input_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (shared, width),
        "self_attn.v_proj.weight": (shared, width),
        "self_attn.o_proj.weight": (width, width),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    for start in range(0, shape.num_blocks, BLOCKS_A_SHARD):
        blocks = range(start, min(start + BLOCKS_A_SHARD, shape.num_blocks))
        yield {f"model.layers.{i}.{name}": size for i in blocks for name, size in block.items()}
    yield {"model.norm.weight": (width,), "lm_head.weight": (shape.vocabulary, width)}


def _random(name: str, size: tuple[int, ...], num_blocks: int) -> Tensor:
    """Numbers that keep the size of what passes through: norms of about one; what is added to the stream shrinks with depth."""
    generator = torch.Generator().manual_seed(sum(name.encode()) * 1009 + len(name))
    numbers = torch.randn(size, generator=generator)
    if len(size) == 1:
        return (1 + 0.1 * numbers).bfloat16()
    scale = size[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        scale *= (2 * num_blocks) ** -0.5
    return (scale * numbers).bfloat16()
