"""A model and what an adapter would train of it, without its weights."""

from __future__ import annotations

from typing import get_args

from fastlora import parameters
from fastlora.training import methods, tasks
from fastlora.training import model as models
from fastlora.training.config import TaskName, load
from fastlora.training.errors import one_of


def describe(
    model: str, *, r: int = 0, target_modules: str = "all-linear", task: str = "causal-lm", depth: int | None = None
) -> str:
    """`fastlora.parameters.table` of a model, with a LoRA adapter of rank ``r`` where that is not 0.

    Raises UserError for a model that is not found and for layers that it has not.
    """
    one_of("task", task, get_args(TaskName))
    found = models.skeleton(models.find(model), tasks.TASKS[task].auto_class)
    if r == 0:
        return parameters.table(found, depth=depth)
    values = {"model": model, "data": "-", "task": task, "r": r, "target_modules": target_modules}
    config = load(None, values)
    models.targets(found, config.target_modules)
    return parameters.table(methods.make(config).adapt(found), depth=depth)
