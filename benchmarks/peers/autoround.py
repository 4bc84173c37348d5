"""AutoRound: rounding and clipping tuned by signed gradients, block by block, asymmetric groups."""

from __future__ import annotations

from auto_round import AutoRound
from torch.utils.data import DataLoader

from peers.script import Stopwatch, Task, linears

ITERATIONS = 200
"""A block; its own default."""


def main() -> None:
    task = Task.parse()
    model, tokenizer = task.load(), task.tokenizer()
    names = list(linears(model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    num_segments, length = task.calibration.shape
    with Stopwatch() as watch:
        tuner = AutoRound(
            model,
            tokenizer,
            bits=task.bits,
            group_size=task.group,
            sym=False,
            iters=ITERATIONS,
            dataset=DataLoader(task.calibration, batch_size=8),
            nsamples=num_segments,
            seqlen=length,
            device_map="cpu",
            enable_torch_compile=False,
        )
        quantised, _ = tuner.quantize()
    weights = {f"{name}.weight": quantised.get_submodule(name).weight for name in names}
    task.finish("auto-round", watch, weights, zero_bits=task.bits)


if __name__ == "__main__":
    main()
