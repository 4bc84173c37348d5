"""HASB: one stored matrix of integers, trained in mixes of sizes, too."""

from anyfit.recipes.base import Nesting, Recipe
from anyfit.recipes.double_rounding import FORMATS, SHARES
from anyfit.trainers.loop import Settings

RECIPE = Recipe(
    name="hessian-aware",
    title="One stored matrix of eight-bit integers, trained in mixes of its sizes",
    paper="Nearly Lossless Adaptive Bit Switching, arXiv 2502.01199 (Hessian-aware stochastic bit switching)",
    about=(
        "As double-rounding, but between the largest and the smallest size each matrix may have a size of its own in each step, the more "
        "bits the more sensitive it is. "
    ),
    quantizer="gptq",
    score="kl",
    training=Nesting(
        Settings(num_steps=100, batch_size=4, rate=3e-4, num_periods=1, together=False), "hessian-aware", scale_rate=3.0, shares=SHARES
    ),
    formats=FORMATS,
)
