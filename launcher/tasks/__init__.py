"""The tasks. A small one is a module; a large one is a package, whose `run.py` is its part in the
launcher, and whose `rank.py` that on each rank.

They are imported when their task runs: `plan` and `env` need no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from launcher.failures import ConfigError

if TYPE_CHECKING:
    from launcher.environment.worker import WorkerEnvironment
    from launcher.ranks.rank import Rank
    from launcher.schema import Config

# What each does, as `shardrun --help` says it, and what it reads: sections, and keys of others.
TASKS = {
    "generate": (
        "prompts -> text, on one rank or several",
        ("generation", "quant", "parallel", "model"),
    ),
    "prepare": (
        "checkpoint -> quantized shards for each rank",
        ("prepare", "calibration", "quant", "parallel", "model"),
    ),
    "export": (
        "prepared checkpoint -> one Hugging Face checkpoint, compressed-tensors where quantized",
        ("export",),
    ),
    "plan": (
        "what each rank will hold, and which sizes work",
        ("plan", "quant", "parallel", "model", "generation"),
    ),
    "verify": (
        "single against parallel, quantized against original",
        ("verify", "generation", "quant", "parallel", "model"),
    ),
    "eval": (
        "perplexity and yes/no accuracy, of the original and the quantized model",
        (
            "eval",
            "quant",
            "parallel",
            "model",
            "generation.prefill_chunk",
            "generation.max_num_seqs",
        ),
    ),
    "bench": (
        "tokens a second, bytes a second, communication and memory, of a checkpoint or a shape",
        ("bench", "quant", "parallel", "model", "generation.prefill_chunk"),
    ),
    "check": ("every sum of a prepared checkpoint, and that it is whole", ()),
    "env": ("what this process sees: launcher, rank, devices", ("parallel",)),
}
RANK_TASKS = ("generate", "verify", "eval", "bench")
_RUN = {
    "prepare": "prepare.run",
    "export": "export",
    "plan": "plan.run",
    "check": "check",
    "env": "env",
}
_RUN_RANK = {
    "generate": "generate",
    "prepare": "prepare.rank",
    "verify": "verify",
    "eval": "eval.rank",
    "bench": "bench.rank",
}
_SECTIONS = {key.partition(".")[0] for _, keys in TASKS.values() for key in keys}
# Keys that only these tasks read, of sections that others read as well.
_READERS = {
    "prompt": ("generate", "verify"),
    "prompts": ("generate", "verify"),
    "prompts_file": ("generate", "verify"),
    "tokenizer": ("generate", "verify", "eval", "prepare", "export"),
    "parallel.simulate_rank": ("bench",),
    "seed": ("bench", "prepare"),
    # plan takes the words of the run that it is for; prepare and export compute on CPUs.
    "device": (*RANK_TASKS, "plan"),
    "kernel": (*RANK_TASKS, "plan"),
    "dtype": (*RANK_TASKS, "plan", "prepare", "export"),
    "run_root": (*RANK_TASKS, "prepare"),
    "output": tuple(task for task in TASKS if task != "env"),
    "quant.max_perplexity_increase": ("prepare",),
    "verify_checksums": ("generate", "verify", "eval", "bench", "prepare", "export"),
}


def reads(task: str, key: str) -> bool:
    """Whether a task reads a key that not all of them read."""
    return task in _READERS[key]


def check_effects(words: list[str], task: str) -> None:
    """Raises ConfigError for a key of the command line that the task never reads."""
    for word in words:
        key = word.partition("=")[0]
        section = key.partition(".")[0]
        is_passed_over = section in _SECTIONS and not {section, key} & set(TASKS[task][1])
        if is_passed_over or task not in _READERS.get(key, TASKS):
            raise ConfigError(f"`{key}` has no effect on {task}; drop it.")


def rank_task(name: str) -> Callable[[Rank], None]:
    """A task's part on one rank, which is to look at its shards first where that is asked for."""
    module = import_module(f"launcher.tasks.{_RUN_RANK[name]}")
    function: Callable[[Rank], None] = module.run_rank

    def run_rank(rank: Rank) -> None:
        if rank.job.config.verify_checksums:
            from launcher.tasks.checksums import check_own_shards

            check_own_shards(rank)
        function(rank)

    return run_rank


def has_ranks(config: Config, environment: WorkerEnvironment) -> bool:
    """Whether the task runs on the ranks; prepare does where it calibrates, or where somebody has
    started several processes, which share the reading."""
    if config.task.name == "prepare":
        from launcher.tasks.prepare.job import calibrates

        return calibrates(config) or not environment.is_plain
    return config.task.name in RANK_TASKS


def local_task(name: str) -> Callable[[Config, WorkerEnvironment], None]:
    """A task that runs in the launcher itself."""
    module = import_module(f"launcher.tasks.{_RUN[name]}")
    function: Callable[[Config, WorkerEnvironment], None] = module.run
    return function
