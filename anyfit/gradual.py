"""Gradual pruning: one run over falling budgets; at each the network is cut, trained, kept as a size of the family, and pruned on.

Paper: "ZipLM: Inference-Aware Structured Pruning of Language Models", arXiv 2302.04089, section 3.3. Second moments, importance and the
sensitivities of attentions and feed-forwards are always those of the network as it was trained last, so that what goes next is what
that one misses least.

Such a network is put back into the whole one's shape for that, with zeros where parts were left out: it computes the same, and parts
that are gone are inactive, so that they cost nothing and are the first to be left out again. Everything that prunes the original prunes
it, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import inf

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.checkpoint import Checkpoint
from anyfit.core.budget import Budget
from anyfit.core.config import Config, format_of
from anyfit.core.errors import BudgetError
from anyfit.core.files import read_json, remove, write_json, written_aside
from anyfit.core.space import Space
from anyfit.devices import moved
from anyfit.family.manifest import Point
from anyfit.family.store import Decoder, Store, refined_file
from anyfit.finalists import Finalists, refined
from anyfit.network import fill
from anyfit.pipeline import GRADUAL, Fit
from anyfit.recovery import Recovery, settled
from anyfit.scores.table import Table
from anyfit.searchers.exact import require, solve
from anyfit.structure.cutting import cut, whole_again
from anyfit.structure.levels import kept_of
from anyfit.structure.space import kept_of_blocks, kept_structures
from anyfit.targets.base import CutTarget
from anyfit.targets.hub_layout import DTYPES
from anyfit.targets.transformers import write_dense
from anyfit.tasks import quality_from_json
from anyfit.tasks.base import Quality

_KEPT = "kept "
"""What the names of the structures that are left begin with, among a network's tensors."""


@dataclass(frozen=True)
class Member:
    """A network that was cut and trained: `tensors` as a file of it holds them, and the structures that are `kept` of the original's, by
    the name of the matrix that reads them."""

    config: Config
    tensors: dict[str, Tensor]
    kept: dict[str, Tensor]


class GradualFit(Fit):
    """A fit that then cuts and trains for each of its settings' budgets."""

    @cached_property
    def budgets(self) -> list[Budget]:
        original = self.space.original(self.checkpoint.bytes_)
        return [Budget.parse(text, original=original) for text in self.settings.recover]

    def require_budgets(self) -> None:
        """Raises `BudgetError` for a budget that no network in floating point meets, that the whole one meets, or that is no tighter than
        the one before."""
        whole = self._dense.costs(self._dense.largest())
        for budget in self.budgets:
            require(self._dense, budget)
            if budget.allows(whole):
                raise BudgetError(f"The whole network meets the budget {budget.text!r}: nothing would be left out.", remedy="Give less.")
        for before, after in pairwise(self.budgets):
            looser = dict(before.limits)
            if all(bound >= looser.get(cost, inf) for cost, bound in after.limits):
                raise BudgetError(
                    f"The budget {after.text!r} is no tighter than {before.text!r} before it.", remedy="Name the largest first."
                )

    def improved(self, finalists: Finalists, points: list[Point]) -> list[Point]:
        found = {point.config: point for point in super().improved(finalists, points)}
        member: Member | Config = self._best(finalists, points)
        for index in range(len(self.budgets)):
            member, quality = self._member(index, member, finalists)
            point = finalists.point(member.config, found[member.config].uniform if member.config in found else None)
            better = refined(point, quality)
            if better.refined and self.group.first:
                finalists.store.write_tensors(refined_file(member.config), member.tensors)
            found[member.config] = better
        return list(found.values())

    def _best(self, finalists: Finalists, points: list[Point]) -> Config:
        """What is pruned, not trained, for the first budget: the exact optimum, unless a config that was measured anyway is closer."""
        exact = solve(self._dense, finalists.table, self.budgets[0])
        if self.group.first:
            finalists.point(exact)
        self.group.wait()
        known = {decision.key: {choice.name for choice in decision.choices} for decision in self._dense.decisions}
        rivals = [
            p for p in points if self.budgets[0].allows(self.space.costs(p.config)) and all(p.config[key] in known[key] for key in known)
        ]
        return min([finalists.point(exact), *rivals], key=lambda point: point.plain_loss).config

    def _member(self, index: int, before: Member | Config, finalists: Finalists) -> tuple[Member, dict[str, Quality]]:
        """The network for one of the budgets, made of the one before or of a config of the original's parts, and its quality on each
        text."""
        folder = finalists.store.folder / GRADUAL / str(index)
        store, done = Store(folder), folder / "quality.json"
        if not self.group.told(done.exists()):
            if isinstance(before, Member):
                config, model, kept = self._pruned(index, before, store)
            else:
                config, model, kept = self._cut(self, self._dense, finalists.store, before)
            self._recovery.run(model, config, self.space.bits(config), store=store, checkpoint="checkpoint.safetensors")
            if self.group.first:
                tensors = settled(model, self._dtype)
                finalists.point(config)  # as it is untrained, to be compared with
                quality = {name: reference.measured(model).to_json() for name, reference in finalists.references.items()}
                store.write_tensors("member.safetensors", tensors | {f"{_KEPT}{name}": own for name, own in kept.items()})
                write_json(done, {"config": config.to_json(), "quality": quality})
            self.group.wait()
        if self.group.first:
            for leftover in (path for path in folder.iterdir() if path.name not in ("member.safetensors", done.name)):
                remove(leftover)
        self.group.wait()
        known = read_json(done)
        assert known is not None
        tensors = store.tensors("member.safetensors")
        kept = {name.removeprefix(_KEPT): tensors.pop(name) for name in list(tensors) if name.startswith(_KEPT)}
        return Member(Config.from_json(known["config"]), tensors, kept), {n: quality_from_json(q) for n, q in known["quality"].items()}

    def _pruned(self, index: int, before: Member, store: Store) -> tuple[Config, PreTrainedModel, dict[str, Tensor]]:
        """A trained network pruned on."""
        run = Fit(self._whole(before, store), self.segments, replace(self.settings, recover=()), self.progress, self.group, self.latency)
        run.space = _within(self._dense, before.config)
        run.encode(store)
        table: Table = run.score(store)
        return self._cut(run, run.space, store, solve(run.space, table, self.budgets[index]))

    def _cut(self, run: Fit, space: Space, store: Store, config: Config) -> tuple[Config, PreTrainedModel, dict[str, Tensor]]:
        """A config of a run, its network cut, and the structures that are left."""
        kept = kept_structures(self.structures, config, store.order)
        model = run.source.build(dict(Decoder(store.variant, self.target, run.source).matrices(space, config)))
        cut(model, self.architecture, kept_of_blocks(self.structures, kept, self.architecture.num_blocks(model)))
        return config, moved(model, self.device), kept

    def _whole(self, member: Member, store: Store) -> Checkpoint:
        """A member in the whole network's shape, as a folder."""
        folder, num_blocks = store.folder / "network", self.architecture.num_blocks(self.checkpoint.skeleton())
        if not self.group.told(folder.exists()):
            if self.group.first:
                model, kept = self._filled(member.config, member.tensors), kept_of_blocks(self.structures, member.kept, num_blocks)
                tensors = whole_again(model, self.checkpoint.skeleton(), self.architecture, kept)
                with written_aside(folder) as aside:
                    write_dense(aside, replace(self.checkpoint.source(()), passthrough=tensors), {}, self._dtype)
            self.group.wait()
        return Checkpoint.open(folder, trust_remote_code=self.checkpoint.trust_remote_code)

    def _filled(self, config: Config, tensors: dict[str, Tensor]) -> PreTrainedModel:
        kept = kept_structures(self.structures, config, lambda name: torch.arange(self.structures[name].num))
        frame = self.checkpoint.frame()
        cut(frame, self.architecture, kept_of_blocks(self.structures, kept, self.architecture.num_blocks(frame)))
        return moved(fill(frame, self.checkpoint.folder, tensors), self.device)

    @cached_property
    def _recovery(self) -> Recovery:
        how = self.recipe.recovery
        assert how is not None
        return Recovery(self.model, self.segments.calibration, how, how.settings_for(self.effort), self.progress, self.group)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[CutTarget.of(self.target).dense(self.source)]

    @cached_property
    def _dense(self) -> Space:
        """What is trained is in floating point."""
        return _within(self.space, self.space.largest(), CutTarget.of(self.target).dense(self.source))


def _within(space: Space, config: Config, dense: str | None = None) -> Space:
    """With those choices alone that keep no more than a config does, in one format where that is said."""
    decisions = []
    for decision in space.decisions:
        most = kept_of(config[decision.key])
        choices = [c for c in decision.choices if most is None or (kept_of(c.name) or 0) <= most]
        decisions.append(replace(decision, choices=tuple(c for c in choices if dense is None or format_of(c.name) == dense)))
    return replace(space, decisions=tuple(decisions))
