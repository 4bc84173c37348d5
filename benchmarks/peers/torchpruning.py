"""Torch-Pruning on an encoder of BERT's kind: heads and feed-forward channels by its group magnitude, at each ratio.

    python -m peers.torchpruning --model FOLDER --ratios "[0.1, 0.2]" --out FOLDER

leaves layer-RATIO.safetensors (the same ratio in each layer) and network-RATIO.safetensors (one threshold for all) in the output folder.
The width of the network is left alone. Needs torch, transformers, safetensors and torch-pruning only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch_pruning as tp
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

STEP = 32
"""Channels are kept in multiples of this, as by whom it is compared with."""


def pruned(folder: Path, ratio: float, *, everywhere: bool) -> nn.Module:
    """The network with this share of its heads and channels removed, or that share of all of them where not `everywhere` the same."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    layers = model.encoder.layer
    heads = {
        getattr(layer.attention.self, name): model.config.num_attention_heads for layer in layers for name in ("query", "key", "value")
    }
    kept = [module for layer in layers for module in (layer.attention.output.dense, layer.output.dense)]
    tokens = torch.arange(1000, 1016)[None]
    pruner = tp.pruner.BasePruner(
        model,
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        global_pruning=not everywhere,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        round_to=STEP,
        ignored_layers=[*kept, model.embeddings, model.pooler],
        root_module_types=[nn.Linear],
        output_transform=lambda found: found.last_hidden_state,
    )
    pruner.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ratios", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for ratio in args.ratios:
        for scope in ("layer", "network"):
            state = pruned(args.model, ratio, everywhere=scope == "layer").state_dict()
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, args.out / f"{scope}-{ratio:.2f}.safetensors")


if __name__ == "__main__":
    main()
