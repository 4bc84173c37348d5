"""Round to nearest with scales weighted by the inputs: the baseline that llama.cpp's importance matrix stands for."""

from anyfit.recipes.base import Recipe

RECIPE = Recipe(
    name="rtn",
    title="Rounding to the nearest, weighted scales",
    paper="none: the method of llama.cpp's quantiser with an importance matrix",
    about=(
        "Scales minimise the error weighted by the inputs' mean squares; every weight is rounded by itself. Several times faster "
        "than GPTQ and clearly worse below five bits. Choose it as a baseline, or for a first look at a large model."
    ),
    quantizer="rtn",
    score="kl",
)
