"""Gemma 2: Llama's matrices, with norms after each half of a block too, and soft-capped scores."""

from dataclasses import replace

from anyfit.architectures.llama import LLAMA

GEMMA2 = replace(LLAMA, name="gemma2")
