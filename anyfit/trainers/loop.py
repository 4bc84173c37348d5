"""The one training loop: a config a step, drawn by a sampler; what is drawn alone is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from anyfit.elastic.linear import ElasticNetwork
from anyfit.progress import Progress
from anyfit.tasks.language import Reference
from anyfit.trainers.sampling import Sampler

BETAS = (0.9, 0.95)
SECONDS = 60.0
"""Between two checkpoints."""


@dataclass(frozen=True)
class Settings:
    """`num_steps` of `batch_size` windows of text each. `rate`: of Adam, falling linearly to zero. `rank` of adapters.
    `num_periods` of a sampler's schedule. `seed`: of adapters, configs and the order of the text."""

    num_steps: int = 600
    batch_size: int = 4
    rate: float = 3e-3
    rank: int = 64
    num_periods: int = 4
    seed: int = 0


Tensors = Mapping[str, Tensor]


def train(
    network: ElasticNetwork,
    sampler: Sampler,
    reference: Reference,
    settings: Settings,
    *,
    checkpoint: Tensors,
    keep: Callable[[dict[str, Tensor]], None],
    progress: Progress,
) -> None:
    """Train what the drawn variants have to train, towards the original's predictions on `reference`'s text.

    `checkpoint` is what `keep` was given last, empty at first: the run then goes on from there, to the very same numbers.
    """
    parameters = dict(network.model.named_parameters())
    trained = {name: value for name, value in parameters.items() if ".variants." in name}
    for value in parameters.values():
        value.requires_grad_(False)
    for value in trained.values():
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.rate, betas=BETAS, weight_decay=0.0)
    first = _restore(trained, optimizer, checkpoint)
    kept = time.monotonic()
    with progress.stage("train", settings.num_steps) as stage:
        stage.advance(first)
        for step in range(first, settings.num_steps):
            config = sampler.draw(step, settings.seed)
            optimizer.param_groups[0]["lr"] = settings.rate * (1 - step / settings.num_steps)
            optimizer.zero_grad()
            loss = _divergence(network, config, reference, _batch(len(reference.tokens), settings, step))
            loss.backward()
            optimizer.step()
            stage.advance(detail=f"KL {float(loss.detach()):.4f} at {_mean_bits(network, config):.1f} bits")
            if time.monotonic() - kept > SECONDS:
                keep(_state(trained, optimizer, step + 1))
                kept = time.monotonic()
    for value in trained.values():
        value.requires_grad_(False)


def _divergence(network: ElasticNetwork, config: Mapping[tuple[str, str], str], reference: Reference, batch: Tensor) -> Tensor:
    """Mean KL per token, in nats."""
    model = network.set(config)
    with _matrix_speed(model.device):
        logits = model(input_ids=reference.tokens[batch].to(model.device), use_cache=False).logits
    return reference.divergence(logits, batch)


def _matrix_speed(where: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the device has them."""
    fast = where.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.autocast(where.type, torch.bfloat16) if fast else nullcontext()


def _mean_bits(network: ElasticNetwork, config: Mapping[tuple[str, str], str]) -> float:
    """Stored bits per trained weight."""
    chosen = [(d.choice(config[d.key]).stored_bytes, d.unit.num_weights) for d in network.decisions]
    return 8 * sum(size for size, _ in chosen) / sum(num for _, num in chosen)


def _batch(num_windows: int, settings: Settings, step: int) -> Tensor:
    """Indices of the windows of a step: all windows come once before any comes again."""
    each = min(settings.batch_size, num_windows)
    per_epoch = num_windows // each
    order = torch.randperm(num_windows, generator=Generator().manual_seed(settings.seed * 1_000_003 + step // per_epoch))
    first = step % per_epoch * each
    return order[first : first + each]


def _state(trained: Tensors, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    """Everything that the next step depends on."""
    found = {"step": torch.tensor(step)}
    for name, value in trained.items():
        state = {"value": value.detach(), **optimizer.state.get(value, {})}
        found |= {f"{key} {name}": entry.to("cpu", copy=True) for key, entry in state.items()}
    return found


def _restore(trained: Tensors, optimizer: torch.optim.Optimizer, checkpoint: Tensors) -> int:
    """The step to go on with."""
    if not checkpoint:
        return 0
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(checkpoint[f"value {name}"])
            if f"step {name}" in checkpoint:
                averages = {key: checkpoint[f"{key} {name}"].to(value.device, copy=True) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[value] = {"step": checkpoint[f"step {name}"].clone(), **averages}
    return int(checkpoint["step"])
