"""Double Rounding on ResNet-20 and CIFAR-10: one stored tensor of integers a layer, run at 8, 6, 4 and 2 bits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import resnet
import torch
from table import Row, Section
from torch import Tensor, nn
from torch.nn import functional

from anyfit.core.config import Config
from anyfit.elastic.nested import NestedNetwork
from anyfit.progress import Progress
from anyfit.trainers.bit_switching import BitSwitching
from anyfit.trainers.loop import Settings, Trainable, train
from anyfit.trainers.losses import MicroBatch, Objective, Outputs
from anyfit.trainers.sampling import Draws, EverySize
from anyfit.training import uniform

SIZES = (8, 6, 4, 2)
SETTINGS = Settings(num_steps=500, batch_size=64, micro_batch=64, rate=5e-4, together=False)
SEEDS = (0, 1, 2)
"""Of the order of the pictures, the same with ALRS and without."""
NUM_TRAINED, NUM_TESTED = 10000, 4000
NEAR = 1.0
"""Points of accuracy that the sizes but the smallest may lose."""


class _Float(Trainable):
    """The network as it is, updated as often as the nested one."""

    def __init__(self, objective: Labels) -> None:
        self.objective = objective
        self.groups = {"weights": dict(objective.model.named_parameters())}
        self.buffers = dict(objective.model.named_buffers())

    def set(self, config: Config) -> None:
        pass

    def bits(self, config: Config) -> float:
        return 32


class _Same(Draws):
    """There is one config."""

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        return [Config({})]


class Pictures:
    def __init__(self, assets: Path) -> None:
        self.some, self.labels = resnet.pictures(assets, "train", NUM_TRAINED, 0)
        self.tested = resnet.pictures(assets, "test", NUM_TESTED, 1)

    def accuracy(self, model: nn.Module) -> float:
        return resnet.accuracy(model, *self.tested)


class Labels(Objective):
    def __init__(self, model: nn.Module, pictures: Pictures) -> None:
        self.model, self._pictures, self.num_samples = model, pictures, len(pictures.some)

    def outputs(self, batch: MicroBatch) -> Outputs:
        return Outputs(self.model(resnet.augmented(self._pictures.some[batch.samples], torch.Generator().manual_seed(batch.step))))

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        return functional.cross_entropy(outputs.logits, self._pictures.labels[batch.samples])


def section(assets: Path, progress: Progress) -> Section:
    pictures, original = Pictures(assets), resnet.trained(assets)
    tuned = copy.deepcopy(original).train()
    settings = replace(SETTINGS, num_steps=SETTINGS.num_steps * len(SIZES))
    _train(_Float(Labels(tuned, pictures)), _Same(), settings, progress)
    reference = pictures.accuracy(tuned)
    rows = [Row(("float, as given", f"{pictures.accuracy(original):.2f}", "", "", "", ""))]
    rows.append(Row(("float, trained as often", f"{reference:.2f}", "", "", "", "")))
    nested = NestedNetwork(copy.deepcopy(original), original.inner, SIZES)
    before = {bits: pictures.accuracy(_at(nested, bits)) for bits in SIZES}
    found: dict[bool, list[dict[int, float]]] = {True: [], False: []}
    exact = True
    for seed, adaptive in product(SEEDS, (True, False)):
        network = NestedNetwork(copy.deepcopy(original), original.inner, SIZES)
        network.model.train()
        subject = BitSwitching(network, Labels(network.model, pictures), adaptive=adaptive)
        _train(subject, EverySize(network.decisions, 1), replace(SETTINGS, seed=seed), progress)
        network.model.eval()
        found[adaptive].append({bits: pictures.accuracy(_at(network, bits)) for bits in SIZES})
        print(seed, adaptive, found[adaptive][-1], flush=True)
        if adaptive:
            exact &= all(_exact(network, bits, pictures.tested[0][:200]) for bits in SIZES)
            nested = network
    for bits in SIZES:
        own, other = ([run[bits] for run in found[adaptive]] for adaptive in (True, False))
        gain, error = _difference(own, other)
        holds = mean(own) >= reference - NEAR if bits > min(SIZES) else gain >= -error
        cells = (
            f"{before[bits]:.2f}",
            f"{mean(own):.2f}",
            f"{mean(other):.2f}",
            f"{gain:+.2f} ± {error:.2f}",
            f"{mean(own) - reference:+.2f}",
        )
        rows.append(Row((f"{bits} bits", *cells), holds))
    stored = nested.stored().values()
    numbers = sum(entry.integers.numel() for entry in stored)
    one, several = sum(entry.bytes_ for entry in stored), sum(numbers * bits // 8 for bits in SIZES)
    rows.append(Row(("outputs of the stored integers", "", "the same to the bit" if exact else "others", "", "", ""), exact))
    rows.append(
        Row(("bytes of the weights, all sizes", f"{several:,} each by itself", f"{one:,}", "", "", f"{one / several:.0%}"), one < several)
    )
    for row in rows:
        print("  ".join(row.cells), flush=True)
    remark = (
        f"ResNet-20, {NUM_TRAINED} training pictures (JPEG, so that the float network starts at less than its authors report), "
        f"{SETTINGS.num_steps} steps of {SETTINGS.batch_size}, an update for each size; accuracy in percent on {NUM_TESTED} test "
        f"pictures, of which {100 * (0.15 / NUM_TESTED) ** 0.5:.1f} are one standard error. "
        "Weights alone are quantised, but for first and last layer. "
        f"Means over {len(SEEDS)} orders of the pictures, the same with rates of the scales' own (ALRS) and without, and the mean "
        "difference with its standard error over the orders. "
        f"8, 6 and 4 bits hold down to {NEAR:g} below the float network, 2 bits where ALRS is no worse by more than that standard error."
    )
    header = ("what", "untrained", "Double Rounding with ALRS", "without", "with against without", "against float")
    return Section("One stored integer network", header, rows, (remark,))


def _difference(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean of paired differences, and its standard error."""
    pairs = [mine - theirs for mine, theirs in zip(own, other, strict=True)]
    return mean(pairs), stdev(pairs) / len(pairs) ** 0.5


def _train(subject: Trainable, sampler: Draws, settings: Settings, progress: Progress) -> None:
    train(subject, sampler, settings, checkpoint={}, keep=lambda _: None, progress=progress)


@torch.no_grad()
def _at(network: NestedNetwork, bits: int) -> nn.Module:
    return network.set(uniform(network.decisions, str(bits)))


def _exact(network: NestedNetwork, bits: int, some: Tensor) -> bool:
    """Whether an ordinary network with what the integers stand for has the outputs that training saw."""
    extracted = network.extracted(resnet.ResNet20(), uniform(network.decisions, str(bits))).eval()
    return torch.equal(extracted(some), _at(network, bits)(some))
