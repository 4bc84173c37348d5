"""Mistral: Llama's matrices; the attention window is not a matter of weights."""

from dataclasses import replace

from anyfit.architectures.llama import LLAMA

MISTRAL = replace(LLAMA, name="mistral")
