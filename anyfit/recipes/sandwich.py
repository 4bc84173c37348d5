"""The sandwich rule with in-place distillation: the largest, the smallest and one between in every step."""

from anyfit.recipes.base import Recipe, Training
from anyfit.recipes.llm_qfa import FORMATS
from anyfit.trainers.loop import Settings

RECIPE = Recipe(
    name="sandwich",
    title="Every size trained at once, the largest teaching the others",
    paper="BigNAS, arXiv 2003.11142; universally slimmable networks, arXiv 1903.05134",
    about=(
        "As llm-qfa with losses as they are, but each step runs as the largest, the smallest and one config between, of which the largest "
        "teaches the others. Of the embedded default, after 67 steps, 4, 3 and 2 bits lose 0.0087, 0.036 and 0.174 nats, and 0.0087, 0.033 "
        "and 0.168 by such an llm-qfa after 200, which is as much computing; without the teaching it is the same. Choose it to compare. "
        "Differs from the papers in that sizes share no weights here, so that the largest can't be disturbed, and in the largest's "
        "loss, which is the divergence from the original's predictions."
    ),
    quantizer="gptq",
    score="kl",
    training=Training(Settings(num_steps=200, distilled=True), "sandwich"),
    formats=FORMATS,
)
