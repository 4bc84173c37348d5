"""ShiftNAS: sizes whose loss still falls are trained more."""

from anyfit.recipes.base import Recipe, Training
from anyfit.recipes.llm_qfa import FORMATS
from anyfit.trainers.loop import Settings

RECIPE = Recipe(
    name="shiftnas",
    title="Every size trained at once, most of all those that still gain",
    paper="ShiftNAS, arXiv 2307.08300",
    about=(
        "As llm-qfa, but how many bits are drawn follows from where the loss fell most since it was measured last. On the embedded default "
        "it does as well after 150 steps as a schedule like the one in LLM-QFA's paper, at the same rate: 4, 3 and 2 bits lose 0.0095, "
        "0.040 and 0.179 nats, and 0.0091, 0.040 and 0.186. llm-qfa now draws otherwise, at twice the rate, and wasn't measured against "
        "it. Choose it where some of the formats are known to need more training than others. Differs from the paper in that the fall "
        "itself takes the place of a gradient, and in configs, which are drawn for given bits and not by a network that is trained to: see "
        "anyfit/trainers/sampling.py."
    ),
    quantizer="gptq",
    score="kl",
    training=Training(Settings(), "shifted"),
    formats=FORMATS,
)
