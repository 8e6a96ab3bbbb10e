"""The paths of MindFormers' guide, as links to what was written.

    output/rtn-a16w8_ckpt           -> llama2_13b_rtn-a16w8_ckpt, as Golden Stick's code calls it
    …/rank_0/rtn-a16w8.ckpt         -> model.safetensors

so that the guide's `cp output/rtn-a16w8_ckpt/rank_0/rtn-a16w8.ckpt …` copies the shard.
"""

from __future__ import annotations

import os
from pathlib import Path

from parallel.checkpoint.readers.prepared import SHARD_FILE
from parallel.checkpoint.regular_file import reason


def link_ranks(output: Path, approach: str) -> bool:
    """Make a link in the directory of each rank.

    Returns:
        False where another process has begun to: nothing else can have, in a new directory.
    """
    for folder in sorted(output.glob("rank_*")):
        try:
            os.symlink(SHARD_FILE, folder / f"{approach}.ckpt")
        except FileExistsError:
            return False
        except OSError:
            break  # a disk without links: the shards are there all the same
    return True


def link_output(output: Path, alias: str) -> list[str]:
    """Make a link beside `output`, or lead an older one of ours there; anything else stays.

    Returns:
        What the user should know of it.
    """
    link = output.with_name(alias)
    before = os.readlink(link) if link.is_symlink() else None
    if before == output.name:
        return []
    # Ours lead to a directory beside, whose name is the link's behind the model's.
    is_ours = before is not None and os.path.dirname(before) == "" and before.endswith(f"_{alias}")
    if os.path.lexists(link) and not is_ours:
        return [f"{link} is left as it is, as something else stands there; use {output}"]
    made = link.with_name(f".{alias}.{os.getpid()}")
    try:
        os.symlink(output.name, made)
        os.replace(made, link)
    except OSError as error:
        made.unlink(missing_ok=True)
        return [f"{link} cannot be made a link to {output.name} ({reason(error)}); use {output}"]
    return [f"{link} led to {before}, and leads to {output.name} now"] if before else []
