"""ShiftNAS: sizes whose loss still falls are trained more."""

from anyfit.recipes.base import Recipe, Training
from anyfit.recipes.llm_qfa import FORMATS
from anyfit.trainers.loop import Settings

RECIPE = Recipe(
    name="shiftnas",
    title="Every size trained at once, most of all those that still gain",
    paper="ShiftNAS, arXiv 2307.08300",
    about=("As llm-qfa, but the bits that are drawn follow from where the loss fell most since it was measured last. "),
    quantizer="gptq",
    score="kl",
    training=Training(Settings(), "shifted"),
    formats=FORMATS,
)
