"""GPTQModel: GPTQ in asymmetric groups."""

from __future__ import annotations

import os

# It wants two workers to load with and takes one from a machine of two cores: it has to be told of more before its import.
if (os.cpu_count() or 1) < 4:
    os.cpu_count = lambda: 4

from gptqmodel import GPTQModel, QuantizeConfig

from peers.script import Stopwatch, Task, linears, weight_bytes


def main() -> None:
    task = Task.parse()
    names = list(linears(task.load()))
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in task.calibration]
    config = QuantizeConfig(bits=task.bits, group_size=task.group, sym=False, desc_act=False, device="cpu")
    quantised = GPTQModel.load(str(task.model), config)
    with Stopwatch() as watch:
        quantised.quantize(rows, batch_size=8)
    folder = task.out / "saved"
    quantised.save(str(folder))
    loaded = GPTQModel.load(str(folder), device="cpu", backend="torch").model
    modules = {name: loaded.get_submodule(name) for name in names}
    # by the class: the instance has the same function compiled, which takes a minute a shape
    weights = {f"{name}.weight": type(module).dequantize_weight(module).T for name, module in modules.items()}
    task.finish("gptqmodel", watch, weights, zero_bits=task.bits, file_bytes=weight_bytes(folder))


if __name__ == "__main__":
    main()
