"""Runtimes that anyfit writes for. One line a target."""

from anyfit.core.registry import Registry
from anyfit.targets.base import Target

targets: Registry[Target] = Registry(
    "target",
    {
        "llama.cpp": "anyfit.targets.llamacpp:TARGET",
        "transformers": "anyfit.targets.transformers:TARGET",
    },
)
