"""Gemma 3, text only: Gemma 2's matrices, with a norm on each head's queries and keys."""

from dataclasses import replace

from anyfit.architectures.gemma2 import NORMED_TWICE
from anyfit.architectures.llama import LLAMA

GEMMA3 = replace(LLAMA, name="gemma3_text", layout=NORMED_TWICE)
