"""Double Rounding: one stored matrix of integers, out of which every size is made."""

from anyfit.recipes.base import Nesting, Recipe
from anyfit.trainers.loop import Settings

FORMATS = {
    "transformers": tuple(tuple(f"int{bits}_sym{group}" for bits in (8, 6, 4, 3, 2)) for group in ("_g128", "_g64", "")),
    "llama.cpp": (("Q8_0", "Q5_0", "Q4_0"),),
}
"""Nested in one another, with as few scales as rows allow. No 16 bits, which would be stored besides: the original has them."""
SHARES = {8: 30.0, 6: 15.0, 5: 10.0, 4: 5.0, 3: 2.0}
"""At many bits losses are so small that those of few bits alone would move the weights."""

RECIPE = Recipe(
    name="double-rounding",
    title="One stored matrix of eight-bit integers holds every smaller size",
    paper="Nearly Lossless Adaptive Bit Switching, arXiv 2502.01199",
    about=(
        "The network is trained at all sizes at once, an update for each size and a slower rate of the shared scales at few bits; what "
        "is kept is one tensor of eight-bit integers a matrix, and an integer operation makes the smaller ones of it. With a scale for "
        "128 columns that is 8.125 bits a weight for all sizes (8.25 and 8.5 with 64 and 32, where rows are no multiples, and 8.5 for "
        "llama.cpp, which has 32); 16 bits are stored besides only where --formats names them. Choose it where the family itself must be "
        "small, or a device is to switch sizes, and for nothing else: at every size it is worse than variants of their own, which GPTQ "
        "makes without training. Of the embedded default with a scale for 32 columns 8, 4, 3 and 2 bits lose 0.010, 0.036, 0.129 and 0.57 "
        "nats after 100 steps, and by themselves less than 0.0001, 0.011, 0.042 and 0.24; a family's notes say both. Differs from the "
        "paper in scales for each group of columns, as runtimes store them, in the loss, which is the divergence from the original's "
        "predictions and counts more at many bits, and in quantising weights alone. Scales are trained by their logarithms; with that "
        "the slower rate, which the paper has for two bits, hasn't shown a gain there."
    ),
    quantizer="gptq",
    score="kl",
    training=Nesting(Settings(num_steps=100, batch_size=4, rate=3e-4, together=False), scale_rate=3.0, shares=SHARES),
    formats=FORMATS,
)
