"""Train the embedded default: a small Llama on the source code of the Python standard library.

    python -m anyfit.zoo.train OUT --minutes 100 --threads 2

Everything it needs is on any machine with Python, torch, transformers and tokenizers. Matrices are trained
by Muon (arXiv 2502.16982), the rest by AdamW. The learning rate follows the clock, not the step count, so
that a busy machine ends on schedule; a run that is stopped continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from anyfit.zoo.corpus import SPLITS, modules

BOS, EOS = 0, 1
WARM_UP_STEPS = 100
LONGEST_STEP = 60.0
"""Seconds that one step may count for: a process that was put to sleep goes on where it was."""
DECAY_FROM = 0.3
"""Share of the time after which the learning rate falls linearly to zero."""


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it encodes any text, and llama.cpp reads it as its own `gpt-2` kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def draw(ids: np.ndarray, batch: int, length: int, rng: np.random.Generator) -> torch.Tensor:
    """`batch` random windows of `length` tokens, (batch, length) int64."""
    starts = rng.integers(0, len(ids) - length - 1, batch)
    return torch.from_numpy(np.stack([ids[at : at + length] for at in starts]).astype(np.int64))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: np.ndarray, length: int, num_batches: int = 32) -> float:
    """Per token, over random windows that are the same at every call."""
    rng, total = np.random.default_rng(1), 0.0
    for _ in range(num_batches):
        x = draw(ids, 16, length, rng)
        total += model(input_ids=x, labels=x).loss.item()
    return math.exp(total / num_batches)


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-3)
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    texts = {split: modules(split) for split in SPLITS}
    tokenizer = train_tokenizer(texts["train"], args.vocab)
    tokenizer.save_pretrained(args.out)
    ids = {
        split: np.array([i for text in part for i in (BOS, *tokenizer.encode(text, add_special_tokens=False), EOS)], dtype=np.uint16)
        for split, part in texts.items()
    }
    print({split: (len(texts[split]), len(part)) for split, part in ids.items()}, flush=True)
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=256, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=args.length, tie_word_embeddings=True,
        bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print("parameters", sum(p.numel() for p in model.parameters()), flush=True)
    record: dict[str, Any] = fit(model, ids, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    model.float()
    record |= {f"{split}_perplexity": perplexity(model, ids[split], args.length, 64) for split in ("search", "report")}
    record |= {"parameters": model.num_parameters(), "python": platform.python_version()}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record, flush=True)


def fit(model: LlamaForCausalLM, ids: dict[str, np.ndarray], args: argparse.Namespace) -> dict[str, float]:
    """Train in place until the time is spent; returns how many steps, tokens and seconds it took."""
    groups, checkpoint = optimizers(model, args.lr), args.out / "checkpoint.pt"
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(groups, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
    rng, last = np.random.default_rng(step), time.monotonic()
    model.train()
    while seconds < args.minutes * 60:
        share = seconds / (args.minutes * 60)
        lr = args.lr * min(1.0, (step + 1) / WARM_UP_STEPS, (1.0 - share) / (1.0 - DECAY_FROM))
        for group in (g for optimizer in groups for g in optimizer.param_groups):
            group["lr"] = lr
        x = draw(ids["train"], args.batch, args.length, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in groups:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, now = step + 1, time.monotonic()
        seconds, last = seconds + min(now - last, LONGEST_STEP), now
        if step % 100 == 0:
            print(f"step {step} {seconds:.0f}s loss {loss.item():.3f} lr {lr:.1e}", flush=True)
        if step % 500 == 0:
            model.eval()
            print(f"step {step} search perplexity {perplexity(model, ids['search'], args.length):.2f}", flush=True)
            model.train()
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in groups], "step": step, "seconds": seconds}
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").rename(checkpoint)
    model.eval()
    checkpoint.unlink(missing_ok=True)
    return {"steps": step, "tokens": step * args.batch * args.length, "seconds": round(seconds)}


if __name__ == "__main__":
    main()
