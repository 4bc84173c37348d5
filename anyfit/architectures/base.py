"""What anyfit knows of a kind of network: facts as data.

An architecture says where the blocks are, which matrices read the same input, and what is tied. It is a
table; nothing in it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anyfit.core.errors import ModelError
from anyfit.core.units import Weight
from anyfit.modeling_cut import Layout, is_removed

Inputs = tuple[tuple[str, dict[str, str]], ...]
"""Groups of matrices that read the same input: the group's name and its {role: path below the block}."""


@dataclass(frozen=True)
class Architecture:
    """One kind of network. All paths are module paths of the transformers class.

    `block` is the path of block `{i}` of a `ModuleList`. `inputs` lists, for one block, the groups of matrices
    that read the same input, in the order in which the network runs them: `(("attention", {"q":
    "self_attn.q_proj", ...}), ...)`. `head` multiplies the last hidden state; where the checkpoint ties it to
    the embedding, the two are one weight with the role `embedding`, whose input is the head's. What reads no tokens has
    no embedding. `before` and `after` are projections outside the blocks, {role: path}, which not every network of the kind has.

    Norms, biases and tables of positions are in no list: they are kept as they are.
    """

    name: str
    block: str
    inputs: Inputs
    embedding: str | None
    head: str | None
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    generic: bool = False
    """Found by looking at the modules rather than known: told to the user."""
    note: str = ""
    """What the user should hear about this description; empty for a kind that is known."""
    layout: Layout | None = None
    """Where heads and channels are in the matrices of a block, by their roles; None where that isn't known."""

    def groups(self, index: int) -> Inputs:
        """The groups of block `index`."""
        return self.inputs

    def num_blocks(self, model: PreTrainedModel) -> int:
        """How many blocks this network has; `ModelError` where it keeps none at `block`."""
        blocks = _module(model, self.block.removesuffix(".{i}"))
        assert isinstance(blocks, nn.ModuleList), type(blocks)
        return len(blocks)

    def weights(self, model: PreTrainedModel) -> Iterator[Weight]:
        """Every matrix that is decided, once, in the order of the network; of a cut network those that it still has. The model may be on
        meta.

        Names are those of the class's parameters, which is how `state_dict` and `from_pretrained` speak; a few
        kinds are saved under other names (GPT-NeoX's `lm_head` as `embed_out`), which transformers translates.

        Raises `ModelError` where the network doesn't have a module that the table names.
        """
        names = _names_by_parameter(model)
        yielded: set[int] = set()
        for path, role, input_, block in self._places(model):
            module = _module(model, path)
            parameter = module.weight
            assert isinstance(parameter, Tensor), path
            if id(parameter) in yielded:
                continue
            yielded.add(id(parameter))
            transposed = isinstance(module, Conv1D)
            rows, columns = reversed(parameter.shape) if transposed else parameter.shape
            name = f"{path}.weight"
            tied = tuple(other for other in names[id(parameter)] if other != name)
            yield Weight(name, (rows, columns), role, input_, block, transposed, tied)

    def hook_path(self, weight: Weight) -> str | None:
        """Path of the module whose input this weight multiplies; None for a table that is only looked up."""
        if weight.input is None:
            return None
        return self.head if weight.role == "embedding" else weight.name.removesuffix(".weight")

    def _places(self, model: PreTrainedModel) -> Iterator[tuple[str, str, str | None, int | None]]:
        """(module path, role, input, block) in order; a tied head comes twice, first as the embedding."""
        if self.embedding is not None:
            tied = self.head is not None and _module(model, self.head).weight is _module(model, self.embedding).weight
            yield self.embedding, "embedding", "head" if tied else None, None
        yield from self._outside(model, self.before)
        for index in range(self.num_blocks(model)):
            prefix = self.block.format(i=index)
            for group, paths in self.groups(index):
                for role, path in paths.items():
                    if not is_removed(model.get_submodule(prefix), path):
                        yield f"{prefix}.{path}", role, f"{prefix}.{group}", index
        yield from self._outside(model, self.after)
        if self.head is not None:
            yield self.head, "head", "head", None

    def _outside(self, model: PreTrainedModel, paths: dict[str, str]) -> Iterator[tuple[str, str, str, None]]:
        modules = dict(model.named_modules())
        for role, path in paths.items():
            if path in modules:
                yield path, role, path, None


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a matrix product that can be decided."""
    return isinstance(module, (nn.Linear, Conv1D))


def _names_by_parameter(model: PreTrainedModel) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _module(model: PreTrainedModel, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no module {path}, where its kind ({model.config.model_type}) keeps one.",
            remedy="Give a causal language model of this kind; if it is one, report this with its config.json.",
        ) from error
