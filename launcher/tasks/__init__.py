"""The tasks: one module each. Those with a rank's part have `run_rank`, the others `run`.

Modules are imported when their task runs: `plan` and `env` need no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from launcher.failures import ConfigError

if TYPE_CHECKING:
    from launcher.environment import WorkerEnvironment
    from launcher.rank import Rank
    from launcher.schema import Config

# What each does, as `shardrun --help` says it, and the sections of keys it reads.
TASKS = {
    "generate": (
        "prompts -> text, on one rank or several",
        ("generation", "quant", "parallel", "model"),
    ),
    "prepare": ("checkpoint -> quantized shards for each rank", ("quant", "parallel", "model")),
    "plan": (
        "what each rank will hold, and which sizes work",
        ("plan", "quant", "parallel", "model", "generation"),
    ),
    "verify": (
        "single against parallel, quantized against original",
        ("verify", "generation", "quant", "parallel", "model"),
    ),
    "env": ("what this process sees: launcher, rank, devices", ("parallel",)),
}
RANK_TASKS = ("generate", "verify")
_SECTIONS = {section for _, sections in TASKS.values() for section in sections}
_PROMPTS = ("prompt", "prompts", "prompts_file")


def check_effects(words: list[str], task: str) -> None:
    """Raises ConfigError for a key of the command line that the task never reads."""
    for word in words:
        key = word.partition("=")[0]
        section = key.partition(".")[0]
        is_passed_over = section in _SECTIONS and section not in TASKS[task][1]
        if is_passed_over or (key in _PROMPTS and task not in RANK_TASKS):
            raise ConfigError(f"`{key}` has no effect on {task}; drop it.")


def rank_task(name: str) -> Callable[[Rank], None]:
    """A task's part on one rank."""
    assert name in RANK_TASKS
    function: Callable[[Rank], None] = import_module(f"launcher.tasks.{name}").run_rank
    return function


def local_task(name: str) -> Callable[[Config, WorkerEnvironment], None]:
    """A task that runs in the launcher itself."""
    assert name in TASKS
    assert name not in RANK_TASKS
    function: Callable[[Config, WorkerEnvironment], None] = import_module(
        f"launcher.tasks.{name}"
    ).run
    return function
