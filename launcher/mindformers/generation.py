"""How the answers are made: sampling, lengths, and how many at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.checkpoint.mindformers.file import ReadFile, is_true
from parallel.checkpoint.mindformers.shape import LENGTHS, SAMPLING


def take_generation(file: ReadFile, given: Mapping[str, Any]) -> None:
    """Sampling, lengths and the batch."""
    sampling = {key: given[key] for key in SAMPLING if key in given}
    if is_true(given.get("do_sample")):
        file.values |= {f"generation.{key}": value for key, value in sampling.items()}
    else:
        # Set in every shipped file beside `do_sample: False`; ours would be refused as ineffective.
        file.ignore("do_sample is not True", sampling)
    # Their order of precedence: new tokens, then either name of the length with the prompt.
    lengths = [key for key in LENGTHS if key in given]
    if lengths:
        ours = "max_new_tokens" if lengths[0] == "max_new_tokens" else "max_length"
        file.values[f"generation.{ours}"] = given[lengths[0]]
        file.ignore(f"{lengths[0]} is given", {key: given[key] for key in lengths[1:]})
    batch_size = file.positive("model.model_config.batch_size", given.get("batch_size", 1))
    if batch_size > 1:
        file.values["generation.max_num_seqs"] = batch_size
    elif "batch_size" in given:
        why = "prompts run together, up to generation.max_num_seqs"
        file.ignore(why, {"batch_size": batch_size})
