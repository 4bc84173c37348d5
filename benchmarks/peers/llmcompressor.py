"""llm-compressor: GPTQ in asymmetric groups."""

from __future__ import annotations

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

from peers.script import Stopwatch, Task, linears, weight_bytes


def main() -> None:
    task = Task.parse()
    model = task.load()
    rows = Dataset.from_dict({"input_ids": task.calibration.tolist(), "attention_mask": (task.calibration * 0 + 1).tolist()})
    layout = QuantizationArgs(num_bits=task.bits, type="int", symmetric=False, strategy="group", group_size=task.group)
    recipe = GPTQModifier(config_groups={"all": QuantizationScheme(targets=["Linear"], weights=layout)}, ignore=["lm_head"])
    num_segments, length = task.calibration.shape
    with Stopwatch() as watch:
        oneshot(
            model=model,
            dataset=rows,
            recipe=recipe,
            max_seq_length=length,
            num_calibration_samples=num_segments,
            shuffle_calibration_samples=False,
        )
    weights = {
        f"{name}.weight": fake_quantize(module.weight, module.weight_scale, module.weight_zero_point, layout)
        for name, module in linears(model).items()
    }
    folder = task.out / "saved"
    model.save_pretrained(folder, save_compressed=True)
    task.finish("llmcompressor", watch, weights, zero_bits=task.bits, file_bytes=weight_bytes(folder))


if __name__ == "__main__":
    main()
