"""The sandwich rule with in-place distillation: the largest, the smallest and one between in every step."""

from anyfit.recipes.base import Recipe, Training
from anyfit.recipes.llm_qfa import FORMATS
from anyfit.trainers.loop import Settings

RECIPE = Recipe(
    name="sandwich",
    title="Every size trained at once, the largest teaching the others",
    paper="BigNAS, arXiv 2003.11142; universally slimmable networks, arXiv 1903.05134",
    about=("As llm-qfa, but each step runs as the largest, the smallest and one config between, and the largest teaches the others. "),
    quantizer="gptq",
    score="kl",
    training=Training(Settings(num_steps=200, distilled=True), "sandwich"),
    formats=FORMATS,
)
