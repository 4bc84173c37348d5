"""LLM-QFA: one run of training makes every size better."""

from anyfit.recipes.base import Recipe, Training
from anyfit.trainers.loop import Settings

FORMATS = {"transformers": (("F16", "BF16", "int8_asym", "int6_asym", "int4_offset", "int3_offset", "int2_offset"),)}
"""With offsets that can be trained, below six bits."""

RECIPE = Recipe(
    name="llm-qfa",
    title="Quantised once, trained once, for every size",
    paper="One QuantLLM for ALL, arXiv 2405.20202",
    about=(
        "GPTQ makes all variants; then one run of training draws a format for every matrix at each step and trains what was drawn, and "
        "nothing else, so that low and high bits don't disturb each other. The drawn mean goes from the most bits to the least and back, "
        "mostly along the configs that are expected to lose least, as the search will take them. Codes never change: adapters that see one "
        "number a group merge into stored offsets; formats without a trainable offset get trained scales, codebooks other entries, "
        "too: of GGUF's, after 200 steps on the embedded default, Q2_K loses 14 % less, and Q3_K to Q5_K gained nothing and stay as they "
        "were. Choose it where there is text like that of the task, and time, and the target stores offsets. Differs from the paper in "
        "the loss, which is the divergence from the original's predictions (the paper's is --towards task), over what a config is "
        "expected to lose, in decisions for each matrix, not each block, in draws, which follow what configs are expected to lose and of "
        "which a third are the smallest or the largest config, and in the search, which is exact: --search correlation lets the paper's "
        "own compete."
    ),
    quantizer="gptq",
    score="kl",
    training=Training(Settings(rate=6e-3), "frontier", relative=True),
    formats=FORMATS,
)
