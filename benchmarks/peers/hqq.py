"""HQQ: half-quadratic fitting of scales and zero points, without calibration data."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

from peers.script import Stopwatch, Task, linears

ZERO_BITS = 16
"""Its zero points are no whole numbers."""


def main() -> None:
    task = Task.parse()
    config = BaseQuantizeConfig(nbits=task.bits, group_size=task.group, axis=1)
    modules = linears(task.load())
    with Stopwatch() as watch:
        quantised = {name: HQQLinear(module, config, compute_dtype=torch.float32, device="cpu") for name, module in modules.items()}
    weights = {f"{name}.weight": module.dequantize() for name, module in quantised.items()}
    task.finish("hqq", watch, weights, zero_bits=ZERO_BITS)


if __name__ == "__main__":
    main()
