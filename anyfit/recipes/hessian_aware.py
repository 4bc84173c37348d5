"""HASB: one stored matrix of integers, trained in mixes of sizes, too."""

from anyfit.recipes.base import Nesting, Recipe
from anyfit.recipes.double_rounding import FORMATS, SHARES
from anyfit.trainers.loop import Settings

RECIPE = Recipe(
    name="hessian-aware",
    title="One stored matrix of eight-bit integers, trained in mixes of its sizes",
    paper="Nearly Lossless Adaptive Bit Switching, arXiv 2502.01199 (Hessian-aware stochastic bit switching)",
    about=(
        "As double-rounding, but between the largest and the smallest size each matrix may run at a size of its own, drawn anew at each "
        "step, with more bits where it is sensitive. Choose it where budgets lie between the sizes: of the embedded default after 100 "
        "steps, a scale for 32 columns, every other matrix called sensitive, random mixes lose 0.31 nats instead of 0.36, 2 and 3 bits "
        "everywhere as much as by double-rounding, 4 and 8 bits 11 and 20 % more; with sensitivities as a fit has them it wasn't measured. "
        "Differs from the paper in sensitivities, which are the Fisher information of a matrix, not its Hessian's trace, and as "
        "double-rounding does."
    ),
    quantizer="gptq",
    score="kl",
    training=Nesting(
        Settings(num_steps=100, batch_size=4, rate=3e-4, num_periods=1, together=False), "hessian-aware", scale_rate=3.0, shares=SHARES
    ),
    formats=FORMATS,
)
