"""Qwen 3: Llama's matrices, with a norm on each head's queries and keys."""

from dataclasses import replace

from anyfit.architectures.llama import LLAMA

QWEN3 = replace(LLAMA, name="qwen3")
