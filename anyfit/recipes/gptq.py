"""GPTQ once, in every format's grid, then the exact frontier. The default."""

from anyfit.recipes.base import Recipe

RECIPE = Recipe(
    name="gptq",
    title="GPTQ in every format's own grid",
    paper="GPTQ, arXiv 2210.17323",
    about=(
        "Each column's rounding error is made good by the columns that are still free, in the grid of the file format itself. "
        "One calibration pass and one factorisation per distinct input serve every format. Choose it whenever there is text to "
        "calibrate with. Differs from the paper in the grids, in how their scales are weighted, and in the order of the columns: "
        "see anyfit/quantizers/gptq.py."
    ),
    quantizer="gptq",
    score="kl",
)
