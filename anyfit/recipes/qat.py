"""Training through the rounding: the baseline."""

from anyfit.recipes.base import Recipe, Tuning
from anyfit.trainers.pv import Settings

RECIPE = Recipe(
    name="qat",
    title="Weights trained through their rounding, each format by itself",
    paper="Estimating or Propagating Gradients Through Stochastic Neurons, arXiv 1308.3432 (straight-through estimation)",
    about=(
        "GPTQ makes all variants; then each format is trained by itself: weights move as if there were no rounding, and after each step "
        "all codes are the nearest ones. It is what the other recipes are measured against; the same as pv-tuning with every code "
        "chosen anew at each step. Differs from plain quantisation-aware training in the loss, which is the divergence from the original's "
        "predictions, and in starting from GPTQ's codes."
    ),
    quantizer="gptq",
    score="kl",
    training=Tuning(Settings(share=1.0)),
)
