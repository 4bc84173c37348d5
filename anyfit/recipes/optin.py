"""OPTIN: fewer heads and channels within a number of multiply-adds, by how far the network's later states move without each."""

from anyfit.recipes.base import Recipe

RECIPE = Recipe(
    name="optin",
    title="Heads and channels within a number of multiply-adds, by the trajectory of what comes after them",
    paper="The Need for Speed (OPTIN), arXiv 2403.17921",
    about=(
        "Every group of heads and every channel is left out once, and what all later blocks and the predictions then do is compared with "
        "the whole network, on little text and without gradients. Those that matter least are left out, as many as a budget of "
        "multiply-adds (macs <= 60%), bytes or milliseconds asks for; weights aren't changed. Choose it to see what structure alone is "
        "worth; ziplm, which repairs what it keeps, is closer to the original at the same size. Differs from the paper in the "
        "search, which is exact and for any mix of budgets, in sizes in steps of 32 channels, in one measured factor for heads and one for "
        "channels, where the authors' code has fixed ones, and in no reduction of tokens."
    ),
    score="kl",
    quantizer="gptq",
    pruning="trajectory",
    formats={"transformers": ((),), "onnxruntime": ((),)},
)
