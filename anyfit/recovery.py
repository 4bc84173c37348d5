"""Recovery: a network from which parts were left out is trained towards the original, all of its numbers.

Paper: "ZipLM: Inference-Aware Structured Pruning of Language Models", arXiv 2302.04089, section 3.3: the divergence of what is
predicted, and the distance of tokens' states after every block. Differs from the paper in that no labels are asked for: the
original's predictions say more, and the text need not be the task's. Encoders, of texts or pictures, learn from states alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures.coverage import passthrough
from anyfit.core.config import Config
from anyfit.distributed import ALONE, Group
from anyfit.family.store import Store
from anyfit.interface import LANGUAGE, interface_of
from anyfit.progress import Progress
from anyfit.recipes import base as recipes
from anyfit.tasks.language import Reference
from anyfit.trainers.loop import Settings, train
from anyfit.trainers.losses import Both, Divergence, Objective, TokenDistance
from anyfit.trainers.whole import Always, Whole
from anyfit.tuning.refining import windows

NETWORKS = 5
"""As much memory as so many networks in float32 take is held beside the original: what is trained, its gradients, two averages of them, and
what they are added up in."""


@dataclass
class Recovery:
    """`original` in memory; `text`, the segments that are trained on."""

    original: PreTrainedModel
    text: Tensor
    how: recipes.Recovery
    settings: Settings
    progress: Progress
    group: Group = ALONE

    def run(self, model: PreTrainedModel, config: Config, bits: float, *, store: Store, checkpoint: str) -> None:
        """Train the cut `model`, which runs as `config`, of so many bits a weight, in place. A killed run goes on from the store's file
        `checkpoint`, to the same numbers."""
        factor = 1.0 if interface_of(model.config) is LANGUAGE else self.how.encoders
        train(
            Whole(model, self._objective(model), bits),
            Always(config),
            replace(self.settings, rate=factor * self.settings.rate),
            checkpoint=store.tensors(checkpoint) if self.group.told((store.folder / checkpoint).exists()) else {},
            keep=lambda state: store.write_tensors(checkpoint, state),
            progress=self.progress,
            group=self.group,
        )

    def _objective(self, model: PreTrainedModel) -> Objective:
        if interface_of(model.config) is not LANGUAGE:
            return TokenDistance(model, self.original, self.text)
        predictions = Divergence(model, self._reference)
        return Both(predictions, TokenDistance(model, self.original, self._windows), self.how.states) if self.how.states else predictions

    @cached_property
    def _windows(self) -> Tensor:
        return windows(self.text)

    @cached_property
    def _reference(self) -> Reference:
        return Reference.of(self.original, self._windows)


@torch.no_grad()
def settled(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a model as it is stored in a type; the model has these very numbers afterwards."""
    found = {}
    for name, tensor in passthrough(model, ())[0].items():
        found[name] = tensor.to(dtype).cpu()
        tensor.copy_(found[name])
    return found
