"""The one training loop: the configs of a step are drawn by a sampler; what is drawn alone is trained."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from anyfit.core.config import Config
from anyfit.core.errors import ModelError
from anyfit.devices import repeatable
from anyfit.elastic.linear import ElasticNetwork
from anyfit.progress import Progress
from anyfit.tasks.language import Reference
from anyfit.trainers.sampling import Draws

BETAS = (0.9, 0.95)
SECONDS = 60.0
"""Between two checkpoints."""
_SAMPLER = "sampler "
"""What names of its state in a checkpoint begin with."""


@dataclass(frozen=True)
class Settings:
    """`num_steps` of `batch_size` windows of text each. `rate`: of Adam, falling linearly to zero. `rank` of adapters.
    `num_periods` of a sampler's schedule. `seed`: of adapters, configs and the order of the text. `together`: where a step draws several
    configs, their gradients are added up for one update; otherwise each has its own."""

    num_steps: int = 600
    batch_size: int = 4
    rate: float = 3e-3
    rank: int = 64
    num_periods: int = 4
    seed: int = 0
    together: bool = True


Tensors = Mapping[str, Tensor]


class Trainable(ABC):
    """What is trained. `groups`: parameters by name, by the name of their group. `buffers`: what else a step changes, by name."""

    groups: Mapping[str, Mapping[str, nn.Parameter]]
    buffers: Tensors = MappingProxyType({})

    @abstractmethod
    def loss(self, config: Config, step: int) -> Tensor:
        """Of a step run as `config`."""

    def rates(self, config: Config, rate: float) -> Mapping[str, float]:
        """Of each group, once the gradients of `config` are there."""
        return dict.fromkeys(self.groups, rate)

    def described(self, config: Config) -> str:
        """In a few words, for whoever watches."""
        return ""


def train(
    trainable: Trainable,
    sampler: Draws,
    settings: Settings,
    *,
    checkpoint: Tensors,
    keep: Callable[[dict[str, Tensor]], None],
    progress: Progress,
) -> None:
    """Train what the drawn configs have to train.

    `checkpoint` is what `keep` was given last, empty at first: the run then goes on from there, to the very same numbers.
    """
    trained = {name: value for group in trainable.groups.values() for name, value in group.items()}
    groups = [{"params": list(group.values()), "name": name} for name, group in trainable.groups.items()]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=BETAS, weight_decay=0.0)
    first = _restore(trained, trainable.buffers, optimizer, checkpoint)
    sampler.restore({key.removeprefix(_SAMPLER): value for key, value in checkpoint.items() if key.startswith(_SAMPLER)})
    kept = time.monotonic()
    for value in trained.values():
        value.requires_grad_(True)
    where = next(iter(trained.values())).device
    with repeatable(where), progress.stage("train", settings.num_steps) as stage:
        stage.advance(first)
        for step in range(first, settings.num_steps):
            rate = settings.rate * (1 - step / settings.num_steps)
            optimizer.zero_grad()
            sampler.observe(step, partial(_evaluated, trainable))
            drawn = sampler.draws(step, settings.seed)
            for number, config in enumerate(drawn, 1):
                loss = trainable.loss(config, step)
                if not loss.isfinite():
                    raise ModelError(
                        f"Training went astray: its loss isn't finite at step {step}{trainable.described(config)}.",
                        remedy="Check the original, or take --recipe gptq, which trains nothing.",
                    )
                loss.backward()
                if number == len(drawn) or not settings.together:
                    _update(optimizer, trainable.rates(config, rate))
            stage.advance(detail=f"loss {float(loss.detach()):.4f}{trainable.described(config)}")
            if time.monotonic() - kept > SECONDS:
                learnt = {f"{_SAMPLER}{name}": value for name, value in sampler.state().items()}
                keep(_state(trained, trainable.buffers, optimizer, step + 1) | learnt)
                kept = time.monotonic()
    for value in trained.values():
        value.requires_grad_(False)


@torch.no_grad()
def _evaluated(trainable: Trainable, config: Config) -> float:
    """Always on what the first step reads."""
    return float(trainable.loss(config, 0))


def _update(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]
    optimizer.step()
    optimizer.zero_grad()


class Divergence(Trainable):
    """A network whose matrices are elastic, towards the original's predictions on `reference`'s text."""

    def __init__(self, network: ElasticNetwork, reference: Reference, settings: Settings) -> None:
        self.network, self.reference, self.settings = network, reference, settings
        parameters = dict(network.model.named_parameters())
        for value in parameters.values():
            value.requires_grad_(False)
        self.groups = {"variants": {name: value for name, value in parameters.items() if ".variants." in name}}

    def loss(self, config: Config, step: int) -> Tensor:
        return divergence(self.network.set(config), self.reference, self.settings, step)

    def described(self, config: Config) -> str:
        sizes = [(d.choice(config[d.key]).stored_bytes, d.unit.num_weights) for d in self.network.decisions]
        return f" at {8 * sum(size for size, _ in sizes) / sum(num for _, num in sizes):.1f} bits"


def divergence(model: PreTrainedModel, reference: Reference, settings: Settings, step: int) -> Tensor:
    """Mean KL per token, in nats, of what a step reads."""
    batch = chosen(len(reference.tokens), settings, step)
    with _autocast(model.device):
        logits = model(input_ids=reference.tokens[batch].to(model.device), use_cache=False).logits
    return reference.divergence(logits, batch)


def _autocast(where: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the device has them."""
    fast = where.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.autocast(where.type, torch.bfloat16) if fast else nullcontext()


def chosen(number: int, settings: Settings, step: int) -> Tensor:
    """Which of so many windows or pictures a step reads: all come once before any comes again."""
    each = min(settings.batch_size, number)
    per_epoch = number // each
    order = torch.randperm(number, generator=Generator().manual_seed(settings.seed * 1_000_003 + step // per_epoch))
    first = step % per_epoch * each
    return order[first : first + each]


def _state(trained: Tensors, buffers: Tensors, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    """Everything that the next step depends on."""
    found = {"step": torch.tensor(step)} | {f"buffer {name}": value.to("cpu", copy=True) for name, value in buffers.items()}
    for name, value in trained.items():
        state = {"value": value.detach(), **optimizer.state.get(value, {})}
        found |= {f"{key} {name}": entry.to("cpu", copy=True) for key, entry in state.items()}
    return found


def _restore(trained: Tensors, buffers: Tensors, optimizer: torch.optim.Optimizer, checkpoint: Tensors) -> int:
    """The step to go on with."""
    if not checkpoint:
        return 0
    with torch.no_grad():
        for name, value in buffers.items():
            value.copy_(checkpoint[f"buffer {name}"])
        for name, value in trained.items():
            value.copy_(checkpoint[f"value {name}"])
            if f"step {name}" in checkpoint:
                averages = {key: checkpoint[f"{key} {name}"].to(value.device, copy=True) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[value] = {"step": checkpoint[f"step {name}"].clone(), **averages}
    return int(checkpoint["step"])
