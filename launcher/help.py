"""What `shardrun --help` and `shardrun TASK --help` say, made from the schema."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from launcher.schema import GROUPS, group_options, keys
from launcher.tasks import TASKS

_EXAMPLES = """\
examples:
  shardrun                                              the embedded demo model, two ranks
  shardrun prompt="Once upon a time" generation.max_new_tokens=40
  shardrun plan checkpoint=~/Llama-2-70b-hf quant=rtn_a16w8 parallel.tp=8
  shardrun prepare checkpoint=~/Llama-2-70b-hf quant=rtn_a16w8 parallel.tp=8 output=~/70b-w8-tp8
  shardrun check checkpoint=~/70b-w8-tp8
  shardrun generate checkpoint=~/70b-w8-tp8 prompts_file=prompts.jsonl
  shardrun export checkpoint=~/70b-w8-tp8 output=~/70b-w8-hf
  shardrun eval quant=rtn_a16w8 checkpoint=~/Llama-2-13b-hf eval.text=wiki.txt parallel.tp=2
  shardrun bench model=llama2_13b quant=rtn_a16w8 bench.tp=[1,2,4] bench.batch_sizes=[1,8]
  torchrun --nproc-per-node 2 -m launcher task=generate checkpoint=~/Llama-2-13b-hf prompt=Hello
"""


def help_text(words: list[str]) -> str:
    """The page for one task if the command line names one, else the overview."""
    chosen = [word.partition("=")[2] for word in words if word.startswith("task=")]
    if chosen and chosen[-1] in TASKS:
        return _task_page(chosen[-1])
    return _overview()


def _overview() -> str:
    tasks = "\n".join(f"  {name:10} {text}" for name, (text, _) in TASKS.items())
    choices = "\n".join(
        f"  {group:10} {', '.join(group_options(group))}" for group in GROUPS if group != "task"
    )
    return (
        "usage: shardrun [TASK] [key=value …]   (no TASK: generate)\n\n"
        f"tasks (shardrun TASK --help says the keys of each):\n{tasks}\n\n"
        f"choices, as in quant=rtn_a16w8:\n{choices}\n\n"
        f"keys of every task:\n{_keys(lambda key: '.' not in key)}\n\n"
        "--cfg job prints the composed configuration instead of running it.\n\n"
        f"{_EXAMPLES}"
    )


def _task_page(name: str) -> str:
    text, sections = TASKS[name]
    wanted = tuple(key if "." in key else f"{key}." for key in sections)
    return (
        f"usage: shardrun {name} [key=value …]\n\n{text}\n\n"
        f"{_keys(lambda key: '.' not in key)}\n\n{_keys(lambda key: key.startswith(wanted))}"
    )


def _keys(is_wanted: Any) -> str:
    return "\n".join(_line(key, item) for key, item in keys() if is_wanted(key))


def _line(key: str, item: dataclasses.Field[Any]) -> str:
    return f"  {f'{key}={_default(item)}':44} {item.metadata['help']}"


def _default(item: dataclasses.Field[Any]) -> str:
    """A field's default as one would type it."""
    if item.default_factory is not dataclasses.MISSING:
        return str(item.default_factory())
    is_yaml_word = item.default is None or isinstance(item.default, bool)
    return json.dumps(item.default) if is_yaml_word else str(item.default)
