"""The command: `shardrun TASK key=value …`, which is `python -m launcher task=TASK key=value …`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from launcher.config import compose
from launcher.environment.ancestry import launching_pid
from launcher.environment.detection import detect
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import EXIT_FAILED, EXIT_USER, USER_ERRORS, RunError, one_line
from launcher.help import help_text
from launcher.job import Job
from launcher.schema import Config, to_yaml
from launcher.tasks import TASKS, check_effects, has_ranks, local_task
from launcher.timeline import Timeline


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit status. Errors are sentences on stderr."""
    timeline = Timeline.of_command()
    words = _task_first(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words, timeline)
    except USER_ERRORS as error:
        _say(one_line(error))
        return EXIT_USER
    except RunError as error:
        _say(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our stdout left: what it wanted to read, it has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _run(words: list[str], timeline: Timeline) -> int:
    if {"--help", "-h"} & set(words):
        print(help_text(words))
        return 0
    environment = detect(os.environ, parent_pid=launching_pid(os.environ))
    if words[:1] == ["--cfg"]:
        print(to_yaml(compose(words[1:], environment.claim)), end="")
        return 0
    notes = [*environment.notes]
    config = compose(words, environment.claim, notes.append)
    check_effects(words, config.task.name)
    if environment.speaks:
        for note in notes:
            _say(note)
        notes = []
    return _run_task(config, environment, timeline, notes)


def _run_task(
    config: Config, environment: WorkerEnvironment, timeline: Timeline, notes: Sequence[str]
) -> int:
    if environment.is_scheduler:
        from launcher.ranks.scheduler import host_until_done

        return host_until_done(environment, config.parallel.start_timeout_s)
    if not has_ranks(config, environment):
        # Several processes were started for a task that has one part: the first does it.
        if environment.rank in (None, 0):
            with _orderly_end():
                local_task(config.task.name)(config, environment)
        return 0
    if environment.is_plain and config.task.name == "bench":
        from launcher.tasks.bench.sizes import run_sizes

        return run_sizes(config, environment, timeline)
    if environment.is_plain:
        return _start_ranks(config, environment, timeline)
    return _be_rank(config, environment, timeline, notes)


@contextmanager
def _orderly_end() -> Iterator[None]:
    """SIGTERM unwinds the stack: what is half written must be removed."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start_ranks(config: Config, environment: WorkerEnvironment, timeline: Timeline) -> int:
    from launcher.ranks.workers import preload_torch, run_workers
    from launcher.resolve import make_job
    from launcher.run_dir import RunDir

    job, notes = make_job(config, environment)
    for note in notes:
        _say(note)
    # Only now: a refusal must not wait for processes that it never needed.
    preload_torch()
    timeline.mark("configuration")
    with _orderly_end():  # until the ranks' own handlers are there
        return run_workers(RunDir.create(job), job.tp, timeline)


def _be_rank(
    config: Config, environment: WorkerEnvironment, timeline: Timeline, notes: Sequence[str]
) -> int:
    """Args: `notes` are said by who turns out to be rank 0."""
    timeline.mark("configuration")
    from launcher.ranks.worker import run_external
    from launcher.resolve import make_job

    def make(reads_prompts: bool) -> tuple[Job, tuple[str, ...]]:
        job, more = make_job(config, environment, reads_prompts=reads_prompts)
        return job, (*notes, *more)

    return run_external(environment, make, timeline, config.parallel.start_timeout_s)


def _task_first(words: list[str]) -> list[str]:
    """`generate prompt=x` -> `task=generate prompt=x`; `--cfg job` goes to the front as `--cfg`."""
    if "--cfg" in words:
        at = words.index("--cfg")
        if words[at + 1 : at + 2] == ["job"]:
            return ["--cfg", *_task_first(words[:at] + words[at + 2 :])]
    if words and words[0] in TASKS:
        return [f"task={words[0]}", *words[1:]]
    return words


def _say(message: object) -> None:
    print(f"shardrun: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
