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
        "largest predicts, which alone is trained towards the original. Of the embedded default after 100 steps, a scale for 32 columns, "
        "8, 4, 3 and 2 bits lose 0.007, 0.034, 0.130 and 0.61 nats, and 0.010, 0.036, 0.129 and 0.57 by double-rounding in as many steps: "
        "choose it where the large sizes matter more. Variants of their own, which GPTQ makes without training, lose far less at every "
        "size. It needs the losses' shares: with all alike the teacher follows its pupils, and 8 bits lose three times as much as when "
        "all are trained towards the original. Differs from the paper in these shares, which there favour two bits, in symmetric integers "
        "with scales that are trained, for each group of columns, and in the loss, which is the divergence from predictions."
    ),
    quantizer="gptq",
    score="kl",
    training=Nesting(Settings(num_steps=100, batch_size=4, rate=3e-4, distilled=True), scale_rate=3.0, shares=SHARES),
    formats=FORMATS,
)
