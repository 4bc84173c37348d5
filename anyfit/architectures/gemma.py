"""Gemma 1: Llama's matrices. The embedding is tied and scaled where it is looked up, not where it is stored."""

from dataclasses import replace

from anyfit.architectures.llama import LLAMA

GEMMA = replace(LLAMA, name="gemma")
