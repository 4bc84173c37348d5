"""A network of a kind that nobody has described: its matrices, found by looking at the modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture, Inputs, is_matrix
from anyfit.core.errors import ModelError

_REMEDY = "Give a causal language model whose blocks hold Linear layers, or describe its kind in an architecture file."


@dataclass(frozen=True)
class GenericArchitecture(Architecture):
    """A description made for one network. Its blocks may differ, so each has its own groups, `per_block`."""

    per_block: tuple[Inputs, ...] = ()

    def groups(self, index: int) -> Inputs:
        return self.per_block[index]


def describe(model: PreTrainedModel) -> GenericArchitecture:
    """What can be seen of a network: blocks, embedding, head, and every Linear or Conv1D of it.

    The blocks are the `ModuleList` whose matrices hold the most numbers. Matrices share an input where they are
    seen to read one tensor in a trial run. The run is on meta, where nothing is computed or allocated, so the
    answer depends on the class and its configuration only. Roles are the paths below the block.

    Raises `ModelError` where the network has no embedding, or no blocks with matrices in them.
    """
    blocks = _blocks(model)
    embedding, head = _ends(model)
    readers, doubt = _readers(model)
    inputs = {path: key for path, key in readers.items() if path != head}
    order = list(inputs)
    start = next(index for index, path in enumerate(order) if path.startswith(f"{blocks}."))
    outside = [path for path in order if not path.startswith(f"{blocks}.")]
    before = {path: path for path in outside if path in order[:start]}
    num_blocks = len(model.get_submodule(blocks))
    return GenericArchitecture(
        name=model.config.model_type,
        block=f"{blocks}.{{i}}",
        inputs=(),
        embedding=embedding,
        head=head,
        before=before,
        after={path: path for path in outside if path not in before},
        generic=True,
        note=_note(model, blocks, len(order), len(outside), doubt),
        per_block=tuple(_groups(inputs, f"{blocks}.{index}.") for index in range(num_blocks)),
    )


def _groups(inputs: dict[str, int], prefix: str) -> Inputs:
    groups: dict[int, list[str]] = {}
    for path, key in inputs.items():
        if path.startswith(prefix):
            groups.setdefault(key, []).append(path.removeprefix(prefix))
    return tuple((paths[0], {path: path for path in paths}) for paths in groups.values())


def _blocks(model: PreTrainedModel) -> str:
    lists: dict[str, nn.ModuleList] = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    candidates = [path for path, modules in lists.items() if not any(is_matrix(module) for module in modules)]
    outermost = [path for path in candidates if not any(path.startswith(f"{other}.") for other in candidates)]
    sizes = {path: _num_weights(lists[path]) for path in outermost}
    if not any(sizes.values()):
        raise ModelError(f"{type(model).__name__} has no blocks with Linear layers, so there is nothing to decide.", remedy=_REMEDY)
    return max(outermost, key=sizes.__getitem__)


def _num_weights(modules: nn.ModuleList) -> int:
    return sum(parameter.numel() for module in modules.modules() if is_matrix(module) for parameter in module.parameters())


def _ends(model: PreTrainedModel) -> tuple[str, str | None]:
    paths = {module: path for path, module in model.named_modules()}
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError as error:
        raise ModelError(f"{type(model).__name__} doesn't say where its embedding is.", remedy=_REMEDY) from error
    if embedding not in paths or not isinstance(getattr(embedding, "weight", None), Tensor):
        raise ModelError(f"{type(model).__name__} has no embedding table.", remedy=_REMEDY)
    head = model.get_output_embeddings()
    return paths[embedding], paths.get(head)


def _readers(model: PreTrainedModel) -> tuple[dict[str, int], str]:
    """{module path: a key of the tensor that it reads} in the order of a trial run, then those that didn't run.

    Also a sentence on what the run did not show; empty where it showed everything.
    """
    read: dict[str, Tensor] = {}
    doubt = ""
    try:
        _run(model, read)
    except Exception as error:  # what foreign code raises on meta can't be listed; the user is told in the note
        doubt = f"A trial run stopped ({type(error).__name__}: {str(error).partition(chr(10))[0]})."
    tensors = list({id(tensor): None for tensor in read.values()})
    readers = {path: tensors.index(id(tensor)) for path, tensor in read.items()}
    unseen = [path for path, module in model.named_modules() if is_matrix(module) and path not in readers]
    readers.update({path: len(tensors) + index for index, path in enumerate(unseen)})
    if unseen:
        doubt += f" {len(unseen)} were not seen to run, as {unseen[0]}, and share nothing."
    return readers, doubt.strip()


def _run(model: PreTrainedModel, read: dict[str, Tensor]) -> None:
    """Fill `read` with the tensor that each matrix reads first, kept alive so that identity means sameness."""

    def remember(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            read.setdefault(path, args[0])

        return hook

    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # the fused kinds of attention ask for values of the mask
    with torch.device("meta"), torch.no_grad():
        # bfloat16 because the grouped products of experts run on meta in no other type
        twin = type(model)(config).eval().to(torch.bfloat16)
        for path, module in twin.named_modules():
            if is_matrix(module):
                module.register_forward_pre_hook(remember(path))
        tokens = torch.ones(1, 4, dtype=torch.long)
        twin(input_ids=tokens, attention_mask=tokens, use_cache=False)


def _note(model: PreTrainedModel, blocks: str, num_matrices: int, num_outside: int, doubt: str) -> str:
    where = f"in the blocks ({blocks})" + (f" and {num_outside} outside" if num_outside else "")
    return (
        f"The kind {model.config.model_type!r} is not described in anyfit: {num_matrices - num_outside} matrices {where} were found "
        f"by looking at the modules. Those that read the same tensor share statistics. {doubt}"
    ).strip()
