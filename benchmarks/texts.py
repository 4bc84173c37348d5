"""Text that the embedded default is measured on."""

from torch import Tensor

from anyfit.calibration.data import held_out
from anyfit.pipeline import Fit
from anyfit.zoo import DATA

MOST = 2**20
"""Segments: more than there are."""


def reported(run: Fit) -> Tensor:
    """All segments of the embedded default's text that are for reports, where a fit takes a few: sixteen times as many tell apart what
    chance would hide, as tuned networks' perplexities differ by a tenth of a percent."""
    tokens, _ = held_out(DATA, run.checkpoint.tokenizer(), length=run.settings.length, num_segments=MOST)
    return tokens
