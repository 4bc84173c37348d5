"""MatQuant: one stored matrix of integers, all sizes of it in every update, the largest teaching the others."""

from anyfit.recipes.base import Nesting, Recipe
from anyfit.recipes.double_rounding import FORMATS, SHARES
from anyfit.trainers.loop import Settings

RECIPE = Recipe(
    name="matquant",
    title="One stored matrix of eight-bit integers, whose largest size teaches the smaller ones",
    paper="Matryoshka Quantization, arXiv 2502.06786",
    about=(
        "As double-rounding, but each update has the gradients of all sizes at once, and the smaller sizes are trained towards what the "
        "largest predicts. "
    ),
    quantizer="gptq",
    score="kl",
    training=Nesting(Settings(num_steps=100, batch_size=4, rate=3e-4, distilled=True), scale_rate=3.0, shares=SHARES),
    formats=FORMATS,
)
