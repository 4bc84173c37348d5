"""Essential sparsity: how many weights a network can lose at once, by the plainest rules there are."""

from anyfit.recipes.base import Recipe

RECIPE = Recipe(
    name="essential-sparsity",
    title="How far plain one-shot sparsity goes before quality drops off",
    paper="The Emergence of Essential Sparsity, arXiv 2306.03805",
    about=(
        "Single weights are zeroed at once and nothing is trained: the smallest of the whole network, those of least magnitude times input "
        "(Wanda, arXiv 2306.11695), and any (the control), at shares from 10 % to 70 % and with 2 of 4, 4 of 8 and 1 of 2 kept side by "
        "side. anyfit show draws quality against sparsity, and says up to where it is free and where the knee is. Choose it to see how "
        "compressible a network is, and as what any cleverer method has to beat. Zeros are stored as any number is: what is written "
        "is no smaller, and faster only where a runtime skips zeros, so budgets are of weights (weights <= 50%). Members are asked "
        "for by name, too (--budget 'wanda2of4 F32'), and matrices may be masked differently where that is better. Differs from "
        "the paper in a floor of 5 % of each matrix, and in saying what is kept of a group, where the paper says what is zeroed."
    ),
    score="kl",
    quantizer="rtn",
    masks=("magnitude", "wanda", "random"),
)
