"""PV-Tuning: codes and scales, tuned by turns."""

from anyfit.recipes.base import Recipe, Tuning
from anyfit.trainers.pv import Settings

RECIPE = Recipe(
    name="pv-tuning",
    title="Codes and scales of each format tuned on what the network predicts",
    paper="PV-Tuning, arXiv 2405.14852",
    about=(
        "GPTQ makes all variants, AQLM those with codebooks of their own; then each format is tuned by itself, in all blocks at once, "
        "towards the original's predictions: scales and codebooks follow their gradients, and the codes whose weights want to move "
        "furthest are chosen anew. Choose it for the formats of two bits, where codes matter most, and where there are minutes for each "
        "format. Differs from the paper in the representation, which is the runtime's own format, whose codebooks move where they are the "
        "matrix's, and in how many codes may change in a step, a tenth, not a hundredth: see anyfit/trainers/pv.py."
    ),
    quantizer="gptq",
    score="kl",
    training=Tuning(Settings()),
)
