"""Runtimes that anyfit writes for. One line a target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyfit.core.registry import Registry

if TYPE_CHECKING:
    from anyfit.targets.base import Target

targets: Registry[Target] = Registry(
    "target",
    {
        "llama.cpp": "anyfit.targets.llamacpp:TARGET",
        "onnxruntime": "anyfit.targets.onnxruntime:TARGET",
        "transformers": "anyfit.targets.transformers:TARGET",
    },
)
