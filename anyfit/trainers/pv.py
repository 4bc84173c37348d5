"""PV-Tuning: codes and scales of a whole network, tuned by turns, a small part of the codes at a time.

Paper: "PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression", arXiv 2405.14852. A step of gradient moves
what is continuous (P). For the codes (V) the loss is linear near where it is, so the best codes are those nearest to the weights
as a step of gradient would have them. A step over all codes must be so short that none changes; one over those few whose weights
want to move furthest may be long. Those are found in a buffer of weights that the gradients move as if there were no codes, as in
the authors' code, where this is the default. With all codes in every step it is straight-through estimation, and the buffer what
quantisation-aware training trains.

Differences from the paper, and why:

* The representation is the format's. Of a grid format, what the paper calls a group is what one entry of the codebook stands for, a
  vector of columns, or a single column of a scalar format; codebooks are the format's own and stay; the continuous parameters are the
  halves that scales and offsets are proportional to. Of additive codebooks, as in the paper, they are scales and codebooks. So what is
  tuned is what a runtime's file holds.
* The loss is the divergence of the network's predictions from the original's.
* Of the vectors that want to move furthest, those move that come nearest to where they want to: many that are far have no nearer code.
* A tenth of the vectors may change in a step, not a hundredth, which was behind (docs/benchmarks/train-once.md).
* Learning rates fall linearly to zero, and are lower for finer grids, which start nearer to the optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.core.config import Config
from anyfit.progress import Progress
from anyfit.tasks.language import Reference, kl
from anyfit.trainers import loop
from anyfit.trainers.loop import Optimizer, Tensors, Trainable, filled, train
from anyfit.trainers.losses import Divergence, Objective
from anyfit.trainers.whole import Always
from anyfit.tuning import moving
from anyfit.tuning.coded import Coded, Matrix, Summed, Tuned


@dataclass(frozen=True)
class Settings(loop.Settings):
    """`rate`: of Adam, for the logarithms of the halves and for entries of codebooks, as a share of their root mean square. `code_rate`: a
    step of the buffer as a share of its norm; for additive codebooks of a run of more than 150 steps as much less (0.01 in one of 450, as
    in the authors' code). Both are the first step's at two bits a weight, and half as much with each bit more.
    `share` of the vectors of each matrix that may get other codes in a step: 1.0 is straight-through estimation, 0.01 the paper's.
    """

    num_steps: int = 150
    rate: float = 5e-3
    code_rate: float = 0.03
    share: float = 0.1


def tune(
    network: PreTrainedModel,
    matrices: Mapping[str, Matrix[Coded | Summed]],
    reference: Reference,
    held_out: Reference,
    *,
    settings: Settings,
    progress: Progress,
    checkpoint: Tensors = MappingProxyType({}),
    keep: Callable[[dict[str, Tensor]], None] = lambda _: None,
) -> Tuned:
    """Move codes and scales of `matrices` (by parameter name) so that the network predicts what the original does.

    `network` runs with their values in place of its own parameters, which it has again afterwards; it isn't the original. `reference` and
    `held_out`: the original's predictions on the text to tune on and on the text that says how much it helped, which is left to whoever
    asks. `checkpoint` and `keep`: see `loop.train`. Deterministic for a number of threads.
    """
    assert reference.log_probs is not None or reference.original is not network, "what is asked again stays as it is"
    with _lent(network, matrices) as parameters:
        subject = Codes(parameters, matrices, Divergence(network, reference), settings)
        before = kl(network, held_out)
        train(
            subject,
            Always(subject.config),
            settings,
            checkpoint=checkpoint,
            keep=keep,
            progress=progress,
            held_out=lambda: kl(network, held_out),
        )
        tuned = subject.coded()
        del subject  # before the stored values are made
        for name, matrix in matrices.items():
            parameters[name].copy_(matrix.placed(tuned[name].format_.decode(tuned[name].data)))
        return Tuned(tuned, before, kl(network, held_out))


@contextmanager
def _lent(network: PreTrainedModel, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """These parameters, which are what they were once they are given back."""
    for value in network.parameters():
        value.requires_grad_(False)
    parameters = {name: network.get_parameter(name) for name in names}
    kept = {name: value.clone() for name, value in parameters.items()}
    try:
        yield parameters
    finally:
        filled(parameters, kept)


class ByTurns(Optimizer):
    """Moves what the `subjects` are stored as, and keeps the network's `parameters`, of the same names, at the values of that."""

    def __init__(self, subjects: Mapping[str, moving.AnySubject], parameters: Mapping[str, nn.Parameter]) -> None:
        self._subjects, self._parameters, self._step = subjects, parameters, torch.tensor(0)
        self.moved = {f"{name} {part}": value for name, subject in subjects.items() for part, value in subject.moved().items()}
        self._place()

    @torch.no_grad()
    def step(self, rates: Mapping[str, float]) -> None:
        self._step += 1
        for name, subject in self._subjects.items():
            gradient = self._parameters[name].grad
            assert gradient is not None, name
            subject.move(gradient, rates, int(self._step))
        self._place()

    def averages(self) -> Tensors:
        own = {f"{name} {part}": value for name, subject in self._subjects.items() for part, value in subject.averages().items()}
        return {"step": self._step, **own}

    def restore(self, moved: Tensors, averages: Tensors) -> None:
        filled(self.moved, moved)
        if averages:
            filled(self.averages(), averages)
        for subject in self._subjects.values():
            subject.follow()
        self._place()

    @torch.no_grad()
    def _place(self) -> None:
        for name, subject in self._subjects.items():
            self._parameters[name].copy_(subject.parameter())


class Codes(Trainable):
    """Codes, scales and codebooks of `matrices`, of which the network's `parameters` of the same names are made."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        matrices: Mapping[str, Matrix[Coded | Summed]],
        objective: Objective,
        settings: Settings,
    ) -> None:
        self.objective, self.groups, self._settings = objective, {"values": parameters}, settings
        self.config = Config.of_formats({name: matrix.coded.format_.name for name, matrix in matrices.items()})
        self._subjects = {name: moving.subject(matrix, settings.share, settings.num_steps) for name, matrix in matrices.items()}
        self._optimizer = ByTurns(self._subjects, parameters)

    def set(self, config: Config) -> None:
        """There is no other."""

    def bits(self, config: Config) -> float:
        sizes = [(subject.bits, subject.buffer.numel()) for subject in self._subjects.values()]
        return sum(bits * number for bits, number in sizes) / sum(number for _, number in sizes)

    def rates(self, config: Config, rate: float) -> Mapping[str, float]:
        return {"continuous": rate, "codes": rate / self._settings.rate * self._settings.code_rate}

    def optimizer(self) -> Optimizer:
        return self._optimizer

    def told(self) -> str:
        subjects = self._subjects.values()
        return f", {sum(subject.changed for subject in subjects) / sum(subject.num_vectors for subject in subjects):.2%} of codes changed"

    def coded(self) -> dict[str, Coded | Summed]:
        """As they are stored."""
        return {name: subject.coded() for name, subject in self._subjects.items()}
