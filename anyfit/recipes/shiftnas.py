"""ShiftNAS: sizes whose loss still falls are trained more."""

from anyfit.recipes.base import Recipe, Training
from anyfit.recipes.llm_qfa import FORMATS
from anyfit.trainers.loop import Settings

RECIPE = Recipe(
    name="shiftnas",
    title="Every size trained at once, most of all those that still gain",
    paper="ShiftNAS, arXiv 2307.08300",
    about=(
        "As llm-qfa with losses as they are, but how many bits are drawn follows from where the loss fell most since it was measured last. "
        "Of the embedded default after 200 steps 4, 3 and 2 bits lose 0.0092, 0.036 and 0.170 nats, and 0.0087, 0.033 and 0.168 by such an "
        "llm-qfa. Choose it where some of the formats are known to need more training than others. Differs from the paper in that the fall "
        "itself takes the place of a gradient, and in configs, which are drawn for given bits and not by a network that is trained to: see "
        "anyfit/trainers/sampling.py."
    ),
    quantizer="gptq",
    score="kl",
    training=Training(Settings(), "shifted"),
    formats=FORMATS,
)
