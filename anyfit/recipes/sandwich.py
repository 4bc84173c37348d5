"""The sandwich rule with in-place distillation: the largest, the smallest and one between in every step."""

from anyfit.recipes.base import Recipe, Training
from anyfit.recipes.llm_qfa import FORMATS
from anyfit.trainers.loop import Settings

RECIPE = Recipe(
    name="sandwich",
    title="Every size trained at once, the largest teaching the others",
    paper="BigNAS, arXiv 2003.11142; universally slimmable networks, arXiv 1903.05134",
    about=(
        "As llm-qfa, but each step runs as the largest, the smallest and one config between, of which the largest teaches the others. On "
        "the embedded default, in a third of the steps, which is as much computing, it does as well as a schedule like the one in "
        "LLM-QFA's paper, at the same rate, and no better: 4, 3 and 2 bits lose 0.0089, 0.041 and 0.183 nats, and 0.0091, 0.040 and 0.186; "
        "without the teaching it is the same. llm-qfa now draws otherwise, at twice the rate, and wasn't measured against it. Choose it to "
        "compare. Differs from the papers in that sizes share no weights here, so that the largest can't be disturbed, and in the "
        "largest's loss, which is the divergence from the original's predictions."
    ),
    quantizer="gptq",
    score="kl",
    training=Training(Settings(num_steps=200, distilled=True), "sandwich"),
    formats=FORMATS,
)
