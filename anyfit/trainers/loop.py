"""The one training loop: the configs of a step are drawn by a sampler; what is drawn alone is trained.

What a step reads is cut into micro-batches. Each one's gradients are made by themselves, by any of the processes that share the work, and
added up in the order of the micro-batches; then all processes make the same step.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Generator, Tensor, nn

from anyfit.core.config import Config
from anyfit.core.errors import ModelError
from anyfit.devices import repeatable
from anyfit.distributed import ALONE, Group
from anyfit.progress import Progress
from anyfit.trainers.losses import MicroBatch, Objective, distilled
from anyfit.trainers.sampling import Draws

BETAS = (0.9, 0.95)
SECONDS = 60.0
"""Between two checkpoints."""
SMOOTHED = 0.9
"""Of a size's loss as it is shown, what stays at each step."""
EVERY = 100
"""Steps between two measurements of the loss on held-out text."""
_VALUE, _BUFFER, _AVERAGE, _SAMPLER, _BEST = "value ", "buffer ", "average ", "sampler ", "best "
"""What names of their states in a checkpoint begin with."""
_LOSSES = "losses"


@dataclass(frozen=True)
class Settings:
    """`num_steps` of `batch_size` samples each, read `micro_batch` at a time. `rate`: of Adam, falling linearly to zero. `rank` of
    adapters. `num_periods` of a sampler's schedule. `seed`: of adapters, configs and the order of the text. `together`: where a step draws
    several configs, their gradients are added up for one update; otherwise each has its own. `distilled`: the first config of a step is
    trained for the objective, the others towards what the first predicts. `patience`: measurements on held-out text without a gain
    after which training ends, as it was at the best of them; None: that text isn't looked at. As the rate falls to zero, the last state was
    the best even on eight windows of text, and few steps at a high rate say little about what slow ones will bring."""

    num_steps: int = 600
    batch_size: int = 4
    micro_batch: int = 2
    rate: float = 3e-3
    rank: int = 64
    num_periods: int = 4
    seed: int = 0
    together: bool = True
    distilled: bool = False
    patience: int | None = None


Tensors = Mapping[str, Tensor]


class Optimizer(ABC):
    """Makes the steps. `moved`: what they change and what the result is made of, by name, the very tensors."""

    moved: Tensors

    @abstractmethod
    def step(self, rates: Mapping[str, float]) -> None:
        """Against the gradients that are with the parameters, at the `rates` of the trainable."""

    @abstractmethod
    def averages(self) -> Tensors:
        """What else the next step depends on, by name."""

    @abstractmethod
    def restore(self, moved: Tensors, averages: Tensors) -> None:
        """Go back to what there was; without `averages` no step follows."""


class Adam(Optimizer):
    """Of every parameter by itself, without decay."""

    def __init__(self, groups: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        self.moved = {name: value for part in groups.values() for name, value in part.items()}
        named = [{"params": list(part.values()), "name": name} for name, part in groups.items()]
        self._adam = torch.optim.AdamW(named, betas=BETAS, weight_decay=0.0)

    def step(self, rates: Mapping[str, float]) -> None:
        for group in self._adam.param_groups:
            group["lr"] = rates[group["name"]]
        self._adam.step()

    def averages(self) -> Tensors:
        return {f"{key} {name}": entry for name, value in self.moved.items() for key, entry in self._adam.state.get(value, {}).items()}

    def restore(self, moved: Tensors, averages: Tensors) -> None:
        filled(self.moved, moved)
        for name, value in self.moved.items():
            if f"step {name}" in averages:
                means = {key: averages[f"{key} {name}"].to(value.device, copy=True) for key in ("exp_avg", "exp_avg_sq")}
                self._adam.state[value] = {"step": averages[f"step {name}"].clone(), **means}


class Trainable(ABC):
    """What is trained, and what for. `groups`: parameters by name, by the name of their group. `buffers`: what a step changes besides what
    its optimiser moves, by name; where there are any, all processes do all of the work. `sharded`: whether processes can run the network
    only together, as each holds a part of it."""

    objective: Objective
    groups: Mapping[str, Mapping[str, nn.Parameter]]
    buffers: Tensors = MappingProxyType({})
    sharded = False

    @abstractmethod
    def set(self, config: Config) -> None:
        """Run as `config` from now on."""

    @abstractmethod
    def bits(self, config: Config) -> float:
        """Mean bits a weight, for whoever watches."""

    def share(self, config: Config) -> float:
        """What its loss is multiplied by."""
        return 1.0

    def rates(self, config: Config, rate: float) -> Mapping[str, float]:
        """Of each group, once the gradients of `config`, or of all up to this one, are there."""
        return dict.fromkeys(self.groups, rate)

    def optimizer(self) -> Optimizer:
        """What makes its steps."""
        return Adam(self.groups)

    def told(self) -> str:
        """More about the last step, for whoever watches."""
        return ""


def train(
    trainable: Trainable,
    sampler: Draws,
    settings: Settings,
    *,
    checkpoint: Tensors,
    keep: Callable[[dict[str, Tensor]], None],
    progress: Progress,
    held_out: Callable[[], float] | None = None,
    group: Group = ALONE,
) -> None:
    """Train what the drawn configs have to train.

    `checkpoint` is what `keep` was given last, empty at first: the run then goes on from there, to the very same numbers. `held_out`: the
    loss on text that isn't trained on, asked for where the settings have patience. All processes of the `group` call this with the same
    arguments; `keep` is called in the first.
    """
    trained = {name: value for part in trainable.groups.values() for name, value in part.items()}
    optimizer = trainable.optimizer()
    if checkpoint:
        _restore(optimizer, trainable.buffers, checkpoint)
    first = int(checkpoint["step"]) if checkpoint else 0
    sampler.restore(_named(_SAMPLER, checkpoint))
    best = _Best(optimizer, trainable.buffers, _named(_BEST, checkpoint))
    sharing = ALONE if trainable.buffers else group
    patience, watched = (0, None) if settings.patience is None else (settings.patience, held_out)
    kept, shown = time.monotonic(), _Losses()
    for value in trained.values():
        value.requires_grad_(True)
    where = next(iter(trained.values())).device
    with repeatable(where), progress.stage("train", settings.num_steps) as stage:
        stage.advance(first)
        for number in range(first, settings.num_steps):
            if watched and number % EVERY == 0 and best.waited(watched()) >= patience:
                break
            rate = settings.rate * (1 - number / settings.num_steps)
            sampler.observe(number, lambda config: _Step(trainable, trained, settings, 0, sharing).evaluated(config))
            drawn = sampler.draws(number, settings.seed)
            step = _Step(trainable, trained, settings, number, sharing)
            for configs in [drawn] if settings.together else [[config] for config in drawn]:
                shown.add(configs, step.gradients(configs), trainable, number)
                optimizer.step(trainable.rates(configs[-1], rate))
            stage.advance(detail=f"{shown}{trainable.told()}")
            if group.first and time.monotonic() - kept > SECONDS:
                state = _copied(optimizer.moved, trainable.buffers) | _prefixed(_AVERAGE, _on_cpu(optimizer.averages()))
                others = _prefixed(_SAMPLER, sampler.state()) | _prefixed(_BEST, best.state())
                keep(state | others | {"step": torch.tensor(number + 1)})
                kept = time.monotonic()
    if watched and best.waited(watched()):
        best.restore()
    for value in trained.values():
        value.requires_grad_(False).grad = None


class _Best:
    """What steps had changed when held-out text was predicted best."""

    def __init__(self, optimizer: Optimizer, buffers: Tensors, state: Tensors) -> None:
        self._optimizer, self._buffers, self._loss, self._waited = optimizer, buffers, math.inf, 0
        self._kept = {name: value for name, value in state.items() if name.startswith((_VALUE, _BUFFER))}
        if state:
            self._loss, self._waited = float(state["loss"]), int(state["waited"])

    def waited(self, loss: float) -> int:
        """How many measurements, this one included, have been no better than the best."""
        self._waited += 1
        if loss < self._loss:
            self._loss, self._waited = loss, 0
            self._kept = _copied(self._optimizer.moved, self._buffers)
        return self._waited

    def restore(self) -> None:
        _restore(self._optimizer, self._buffers, self._kept)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; nothing before the first measurement."""
        if not self._kept:
            return {}
        figures = {"loss": torch.tensor(self._loss, dtype=torch.float64), "waited": torch.tensor(self._waited)}
        return self._kept | figures


class _Step:
    """One step of training, cut into micro-batches."""

    def __init__(self, trainable: Trainable, trained: Mapping[str, nn.Parameter], settings: Settings, number: int, group: Group) -> None:
        self._trainable, self._trained, self._settings, self._number, self._group = trainable, trained, settings, number, group
        self._read = chosen(trainable.objective.num_samples, settings, number)
        self._batches = [MicroBatch(number, part) for part in self._read.split(settings.micro_batch)]
        self._teachers: dict[int, Tensor] = {}

    def gradients(self, configs: Sequence[Config]) -> Tensor:
        """Leaves the sum of the gradients of these configs with the parameters. Their losses, (configs,)."""
        sharded = self._trainable.sharded
        found = self._group.summed(range(len(self._batches)), lambda index: self._of_batch(index, configs), in_step=sharded)
        for name, value in self._trained.items():
            value.grad = found.get(name)
        return found[_LOSSES]

    @torch.no_grad()
    def evaluated(self, config: Config) -> float:
        """The objective's loss."""
        self._trainable.set(config)
        objective = self._trainable.objective

        def made(batch: MicroBatch) -> dict[str, Tensor]:
            return {_LOSSES: self._part(batch) * objective.loss(objective.outputs(batch), batch)}

        return float(self._group.summed(self._batches, made, in_step=self._trainable.sharded)[_LOSSES])

    def _of_batch(self, index: int, configs: Sequence[Config]) -> dict[str, Tensor]:
        """Gradients of one micro-batch's part of the losses, by parameter, of those that the configs have; and these losses."""
        batch, losses = self._batches[index], []
        for value in self._trained.values():
            value.grad = None
        for config in configs:
            self._trainable.set(config)
            loss = self._part(batch) * self._loss(index, batch)
            (self._trainable.share(config) * loss).backward()
            losses.append(loss.detach())
        gradients = {name: value.grad for name, value in self._trained.items() if value.grad is not None}
        return {**gradients, _LOSSES: torch.stack(losses)}

    def _loss(self, index: int, batch: MicroBatch) -> Tensor:
        objective = self._trainable.objective
        outputs = objective.outputs(batch)
        if self._settings.distilled:
            assert outputs.logits is not None, "what teaches predicts"
            if index in self._teachers:
                return distilled(outputs.logits, self._teachers[index])
            self._teachers[index] = outputs.logits.detach()
        return objective.loss(outputs, batch)

    def _part(self, batch: MicroBatch) -> float:
        return len(batch.samples) / len(self._read)


class _Losses:
    """Running means, by whole bits."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}

    def add(self, configs: Sequence[Config], losses: Tensor, trainable: Trainable, step: int) -> None:
        """Raises `ModelError` for a loss that isn't finite."""
        for config, loss in zip(configs, losses.tolist(), strict=True):
            bits = trainable.bits(config)
            if not math.isfinite(loss):
                raise ModelError(
                    f"Training went astray: its loss isn't finite at step {step} at {bits:.1f} bits.",
                    remedy="Check the original, or take --recipe gptq, which trains nothing.",
                )
            before = self._means.get(round(bits), loss)
            self._means[round(bits)] = SMOOTHED * before + (1 - SMOOTHED) * loss

    def __str__(self) -> str:
        return "loss " + ", ".join(f"{mean:.3g} at {bits} bits" for bits, mean in sorted(self._means.items()))


def chosen(number: int, settings: Settings, step: int) -> Tensor:
    """Which of so many windows or pictures a step reads: all come once before any comes again."""
    each = min(settings.batch_size, number)
    per_epoch = number // each
    order = torch.randperm(number, generator=Generator().manual_seed(settings.seed * 1_000_003 + step // per_epoch))
    first = step % per_epoch * each
    return order[first : first + each]


def _prefixed(prefix: str, state: Tensors) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def _named(prefix: str, checkpoint: Tensors) -> dict[str, Tensor]:
    """The state that is in a checkpoint under this prefix."""
    return {name.removeprefix(prefix): value for name, value in checkpoint.items() if name.startswith(prefix)}


def _on_cpu(tensors: Tensors) -> dict[str, Tensor]:
    """Copies."""
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _copied(moved: Tensors, buffers: Tensors) -> dict[str, Tensor]:
    """All that steps change, as it is now."""
    return _prefixed(_VALUE, _on_cpu(moved)) | _prefixed(_BUFFER, _on_cpu(buffers))


def _restore(optimizer: Optimizer, buffers: Tensors, state: Tensors) -> None:
    """What was copied, and averages where there are some."""
    filled(buffers, _named(_BUFFER, state))
    optimizer.restore(_named(_VALUE, state), _named(_AVERAGE, state))


@torch.no_grad()
def filled(tensors: Tensors, values: Tensors) -> None:
    """Put `values` into the `tensors` of the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
