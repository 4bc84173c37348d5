"""The one training loop, on a small matrix for each config: micro-batches, distillation, what is shown, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from anyfit.core.config import Config
from anyfit.progress import Silent
from anyfit.trainers import loop
from anyfit.trainers.losses import MicroBatch, Objective, Outputs
from anyfit.trainers.sampling import Draws

SAMPLES, INPUTS, CLASSES = 12, 6, 4
BITS = {"large": 4.2, "middle": 3.0, "small": 1.9}
SETTINGS = loop.Settings(num_steps=8, batch_size=5, micro_batch=2, rate=0.1)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


class Classes(Objective):
    num_samples = SAMPLES

    def __init__(self) -> None:
        self.inputs, self.labels = random(SAMPLES, INPUTS, seed=0), random(SAMPLES, CLASSES, seed=1).argmax(1)
        self.matrix = torch.zeros(INPUTS, CLASSES)
        self.read: list[list[int]] = []

    def outputs(self, batch: MicroBatch) -> Outputs:
        self.read.append(batch.samples.tolist())
        return Outputs(self.inputs[batch.samples] @ self.matrix)

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        return cross_entropy(outputs.logits, self.labels[batch.samples])


class Matrices(loop.Trainable):
    """One matrix for each config."""

    def __init__(self, shares: dict[str, float] | None = None) -> None:
        self.objective: Classes = Classes()
        self.values = {name: nn.Parameter(random(INPUTS, CLASSES, seed=2 + index)) for index, name in enumerate(BITS)}
        self.groups = {"matrices": self.values}
        self.shares = shares or {}

    def set(self, config: Config) -> None:
        self.objective.matrix = self.values[config.format("all")]

    def bits(self, config: Config) -> float:
        return BITS[config.format("all")]

    def share(self, config: Config) -> float:
        return self.shares.get(config.format("all"), 1.0)


def config(name: str) -> Config:
    return Config.of_formats({"all": name})


class Always(Draws):
    def __init__(self, *names: str) -> None:
        self._names = names

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        return [config(name) for name in self._names]


def run(subject: Matrices, settings: loop.Settings, *names: str, **more: Any) -> Matrices:
    rest: dict[str, Any] = {"checkpoint": {}, "keep": lambda _: None, "progress": Silent()}
    loop.train(subject, Always(*names), settings, **(rest | more))
    return subject


def gradients(monkeypatch: pytest.MonkeyPatch, subject: Matrices, settings: loop.Settings, *names: str) -> dict[str, Tensor | None]:
    """Of the first step."""
    found: dict[str, Tensor | None] = {}

    def update(*_: Any) -> None:
        found.update({name: None if value.grad is None else value.grad.clone() for name, value in subject.values.items()})

    monkeypatch.setattr(loop.Adam, "step", update)
    run(subject, replace(settings, num_steps=1), *names)
    return found


def expected(subject: Matrices, name: str, teacher: str | None = None) -> Tensor:
    """The gradient of the whole batch at once."""
    objective, matrix = subject.objective, subject.values[name].detach().clone().requires_grad_()
    read = loop.chosen(SAMPLES, SETTINGS, 0)
    logits = objective.inputs[read] @ matrix
    loss = cross_entropy(logits, objective.labels[read])
    if teacher:
        wanted = (objective.inputs[read] @ subject.values[teacher].detach()).softmax(-1)
        loss = kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")
    loss.backward()
    assert matrix.grad is not None
    return matrix.grad


def test_micro_batches_add_up_to_the_batch_and_leave_alone_what_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Matrices()
    found = gradients(monkeypatch, subject, SETTINGS, "middle")
    assert found["large"] is None and found["small"] is None
    assert torch.allclose(found["middle"], expected(subject, "middle"), atol=1e-6)  # type: ignore[arg-type]
    assert [len(part) for part in subject.objective.read] == [2, 2, 1]
    assert [sample for part in subject.objective.read for sample in part] == loop.chosen(SAMPLES, SETTINGS, 0).tolist()


@pytest.mark.parametrize("together", [True, False])
def test_the_first_config_teaches_the_others_and_learns_nothing_from_them(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Matrices({"small": 3.0})
    settings = replace(SETTINGS, distilled=True, together=together)
    found = gradients(monkeypatch, subject, settings, *(["large", "middle", "small"] if together else ["large", "small"]))
    wanted = {"large": expected(subject, "large"), "small": 3 * expected(subject, "small", "large")}
    if not together:  # each update has its own gradients; these are the last one's
        assert found["large"] is None
        del wanted["large"]
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name  # type: ignore[arg-type]


class Watched(Silent):
    """Keeps what is shown."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Any]:
        yield self

    def advance(self, n: int = 1, detail: str = "") -> None:
        self.told.append(detail)


def test_the_loss_of_every_size_is_shown() -> None:
    watched = Watched()
    run(Matrices(), replace(SETTINGS, num_steps=2, rate=1e-9), "large", "small", progress=watched)
    first, then = watched.told[1:]
    shown = [part.split(" at ") for part in first.removeprefix("loss ").split(", ")]
    assert [bits for _, bits in shown] == ["2 bits", "4 bits"]
    subject, read = Matrices(), loop.chosen(SAMPLES, SETTINGS, 0)
    for (loss, _), name in zip(shown, ("small", "large"), strict=True):
        logits = subject.objective.inputs[read] @ subject.values[name]
        assert float(loss) == pytest.approx(float(cross_entropy(logits, subject.objective.labels[read]).detach()), rel=1e-2)
    assert then != first


def measured(losses: list[float], subject: Matrices, seen: list[Tensor]) -> Callable[[], float]:
    """Held-out losses that are made up; what they were measured of is kept."""

    def held_out() -> float:
        seen.append(subject.values["small"].detach().clone())
        return losses[len(seen) - 1]

    return held_out


def test_training_ends_where_held_out_text_says_so_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EVERY", 1)
    monkeypatch.setattr(loop, "SECONDS", -1.0)
    losses, kept = [5.0, 4.0, 3.0, 3.5, 3.0, 9.0, 9.0], list[dict[str, Tensor]]()
    settings = replace(SETTINGS, patience=2)
    seen: list[Tensor] = []
    subject = Matrices()
    run(subject, settings, "small", held_out=measured(losses, subject, seen), keep=kept.append)
    assert len(kept) == 4, "no step after the second measurement that was no better"
    assert torch.equal(subject.values["small"], seen[2]) and not torch.equal(seen[2], seen[3])
    for number, checkpoint in enumerate(kept, 1):
        again = Matrices()
        run(again, settings, "small", held_out=measured(losses[number:], again, []), checkpoint=checkpoint)
        assert torch.equal(again.values["small"], seen[2]), number


def test_a_last_step_that_is_best_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EVERY", 3)
    subject, seen = Matrices(), list[Tensor]()
    run(subject, replace(SETTINGS, patience=3), "small", held_out=measured([3.0, 2.0, 2.5, 1.0], subject, seen))
    assert len(seen) == 4 and torch.equal(subject.values["small"], seen[3]) and not torch.equal(seen[2], seen[3])
    plain = run(Matrices(), SETTINGS, "small")
    assert torch.equal(plain.values["small"], subject.values["small"]), "measuring changes nothing"
