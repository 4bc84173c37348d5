"""Named tasks of EleutherAI's lm-evaluation-harness, an optional extra."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anyfit.core.errors import RuntimeMissingError, UserError

_BATCH_SIZE = 8


def check_tasks(names: Sequence[str]) -> Any:
    """lm-eval's `TaskManager`, which knows them all. Raises as `run` does, before anything is measured."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeMissingError("lm-eval", "eval", "Measuring on named tasks") from error
    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"lm-eval has no task {name!r}.", remedy=f"{hint}It lists its tasks by: lm-eval ls tasks.")
    return manager


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[str], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}}, with standard errors as lm-eval names them (`acc_stderr`).

    `tasks`: names, tags or groups of lm-eval, or YAML files of one's own. Most tasks fetch their data from the
    hub. `limit`: examples a task. Raises `RuntimeMissingError` without lm-eval, `UserError` for a task that it
    doesn't know or whose data can't be had.
    """
    manager = check_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # The wrapper gives the tokenizer a padding token: that one is its own.
    wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=_BATCH_SIZE, device=str(model.device))
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    except OSError as error:
        raise UserError(f"The data of {', '.join(tasks)} can't be had: {error}", remedy="Check the connection to the hub.") from error
    return {
        task: {name.removesuffix(",none"): float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for task, metrics in found["results"].items()
    }
