"""Qwen 2 and 2.5: Llama's matrices, with biases on q, k and v."""

from dataclasses import replace

from anyfit.architectures.llama import LLAMA

QWEN2 = replace(LLAMA, name="qwen2")
