"""Kinds of networks that anyfit knows, by the `model_type` of their configuration. One line a kind."""

from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.architectures.generic import describe
from anyfit.core.registry import Registry

architectures: Registry[Architecture] = Registry(
    "architecture",
    {
        "llama": "anyfit.architectures.llama:LLAMA",
        "mistral": "anyfit.architectures.mistral:MISTRAL",
        "qwen2": "anyfit.architectures.qwen2:QWEN2",
        "qwen3": "anyfit.architectures.qwen3:QWEN3",
        "gemma": "anyfit.architectures.gemma:GEMMA",
        "gemma2": "anyfit.architectures.gemma2:GEMMA2",
        "gemma3_text": "anyfit.architectures.gemma3:GEMMA3",
        "gpt2": "anyfit.architectures.gpt2:GPT2",
        "gpt_neox": "anyfit.architectures.gpt_neox:GPT_NEOX",
        "opt": "anyfit.architectures.opt:OPT",
        "bert": "anyfit.architectures.bert:BERT",
        "vit": "anyfit.architectures.vit:VIT",
        "phi3": "anyfit.architectures.phi3:PHI3",
    },
)


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The description of this network: the registered one of its kind, otherwise one made by looking at it.

    The model may be on meta. A description that was made has `generic=True` and a `note` for the user.
    Raises `ModelError` where there is nothing to describe: no blocks, or no matrices in them.
    """
    kind = model.config.model_type
    return architectures.get(kind) if kind in architectures else describe(model)
