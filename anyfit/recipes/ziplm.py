"""ZipLM: fewer heads and narrower feed-forwards, as many as a measured latency allows."""

from anyfit.recipes.base import Recipe, Recovery
from anyfit.trainers.loop import Settings

RECIPE = Recipe(
    name="ziplm",
    title="Heads and channels taken out one by one, within a measured latency",
    paper="ZipLM, arXiv 2302.04089",
    about=(
        "Heads and feed-forward channels are removed one at a time, the one that costs least first, and what is kept makes good for it "
        "by least squares on the calibration text. How much each attention and feed-forward keeps is solved exactly (up to 50,000 "
        "partial solutions at once) for any budget of bytes, multiply-adds, or milliseconds as they were measured (anyfit measure, "
        "--latency). Choose it where the network must be faster: fewer bits alone are faster on few runtimes. With --recover the network "
        "is trained at one budget after another and pruned on from there, which takes minutes and more, and keeps far more where much is "
        "taken out. Differs from the paper in the weights of the layers' errors, which are measured (searched ones compete with --search "
        "layer-weights), in the solver, which needs no buckets of time, in removing whole groups of heads where they share keys and "
        "values, and in training on no labels."
    ),
    score="kl",
    quantizer="gptq",
    pruning="obs",
    # The embedded default at 2x, 200 steps: KL 0.674 from predictions alone, 0.657 from states as well, which takes half as long again.
    # MiniLM with half of its channels: cosine 0.928, after 40 steps at the language models' rate 0.858, after 100 at a tenth of it 0.932.
    recovery=Recovery(Settings(rate=1e-3), states=1.0, encoders=0.1),
    formats={"transformers": ((),), "onnxruntime": ((),)},
)
