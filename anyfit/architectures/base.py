"""What anyfit knows of a kind of network: facts as data.

An architecture says where the blocks are, which matrices read the same input, and what is tied. It is a
table; nothing in it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from anyfit.core.errors import ModelError
from anyfit.core.units import Weight


@dataclass(frozen=True)
class Architecture:
    """One kind of network. All paths are module paths of the transformers class.

    `inputs` lists, for one block, the groups of matrices that read the same input, in the order in which the
    network runs them: `(("attention", {"q": "self_attn.q_proj", ...}), ...)`, each group with its name and
    its {role: path below the block}. `head` multiplies the last hidden state; where the checkpoint ties it
    to the embedding, the two are one weight with the role `embedding`, whose input is the head's.
    """

    name: str
    block: str
    inputs: tuple[tuple[str, dict[str, str]], ...]
    embedding: str
    head: str | None
    generic: bool = False
    """Found by looking at the modules rather than known: told to the user."""

    def weights(self, model: PreTrainedModel) -> Iterator[Weight]:
        """Every matrix that is decided, once, in the order of the network. The model may be on meta.

        Raises `ModelError` where the network doesn't have a module that the table names.
        """
        names = _parameter_names(model)
        yield from self._ends(model, names, first=True)
        for index in range(model.config.get_text_config().num_hidden_layers):
            prefix = self.block.format(i=index)
            for group, paths in self.inputs:
                for role, path in paths.items():
                    yield _weight(model, f"{prefix}.{path}", role, f"{prefix}.{group}", index, names)
        yield from self._ends(model, names, first=False)

    def _ends(self, model: PreTrainedModel, names: dict[int, list[str]], *, first: bool) -> Iterator[Weight]:
        table = model.get_submodule(self.embedding).weight
        tied = self.head is not None and model.get_submodule(self.head).weight is table
        if first:
            yield _weight(model, self.embedding, "embedding", "head" if tied else None, None, names)
        elif self.head is not None and not tied:
            yield _weight(model, self.head, "head", "head", None, names)


def _parameter_names(model: PreTrainedModel) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _weight(model: PreTrainedModel, path: str, role: str, input_: str | None, block: int | None, names: dict[int, list[str]]) -> Weight:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no module {path}.", remedy="Its architecture file names it; report this with the model's config.json.") from error
    transposed = isinstance(module, Conv1D)
    shape = tuple(reversed(module.weight.shape)) if transposed else tuple(module.weight.shape)
    name = f"{path}.weight"
    tied = tuple(n for n in names[id(module.weight)] if n != name)
    return Weight(name=name, shape=shape, role=role, input=input_, block=block, transposed=transposed, tied=tied)
