"""What networks are for: what a distance between two networks' outputs means. One line a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from anyfit.core.registry import Registry
from anyfit.interface import interface_of
from anyfit.tasks.base import Quality, Task

tasks: Registry[Task] = Registry(
    "task",
    {
        "language": "anyfit.tasks.language:TASK",
        "embedding": "anyfit.tasks.embedding:TASK",
        "classes": "anyfit.tasks.classes:TASK",
    },
)


def task_of(config: PretrainedConfig) -> Task:
    """What a network of this kind is for."""
    return tasks.get(interface_of(config).task)


def quality_from_json(data: Mapping[str, Any]) -> Quality:
    """Figures as they were written, of whichever task."""
    return tasks.get(data.get("task", "language")).quality.from_json(data)  # families of earlier versions are all of language models
