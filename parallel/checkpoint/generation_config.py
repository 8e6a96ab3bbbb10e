"""What a checkpoint says of how text is made: `generation_config.json`, read as transformers reads it.

Where there is none, transformers takes the same keys of config.json. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import read_json_object
from parallel.model.config import token_ids

GENERATION_CONFIG = "generation_config.json"
_EOS = "eos_token_id"

# Every key with which transformers gives another text, and the value that changes nothing; null, an
# empty list and an empty object change nothing either.
NEUTRAL: Mapping[str, Any] = {
    # How long an answer is.
    "max_length": 20,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": None,
    "stop_strings": None,
    # Which search finds it.
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "length_penalty": 1.0,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    # What is done to the logits.
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    # What is done to the prompt.
    "token_healing": False,
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint would have done with a prompt.

    Attributes:
        file: which file says it.
        eos_token_ids: what ends an answer.
        changes: the keys of NEUTRAL with a value that changes the text.
        notes: what the user should know of how it was read.
    """

    file: str
    eos_token_ids: tuple[int, ...]
    changes: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_generation_defaults(
    path: Path, config: Mapping[str, Any], own_eos: tuple[int, ...]
) -> GenerationDefaults:
    """Those of a directory.

    Args:
        config: the values of its config.json.
        own_eos: the end-of-sequence ids that config.json says.

    Raises:
        CheckpointError: the file is not readable JSON, or no object.
        ModelError: its eos_token_id is none.
    """
    file = path / GENERATION_CONFIG
    if not file.exists():
        return GenerationDefaults("config.json", own_eos, _changes(config))
    values = read_json_object(file)
    if values.get(_EOS) is None:
        return GenerationDefaults(file.name, own_eos, _changes(values))
    eos = token_ids(values[_EOS], str(file))
    unused = [number for number in own_eos if number not in eos]
    return GenerationDefaults(file.name, eos, _changes(values), _eos_notes(eos, unused))


def _changes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: values[key]
        for key, neutral in NEUTRAL.items()
        if values.get(key) not in (None, [], {}, neutral)
    }


def _eos_notes(eos: tuple[int, ...], unused: list[int]) -> tuple[str, ...]:
    """Only of ids that end nothing: instructed models add theirs to the one of config.json."""
    if not unused:
        return ()
    ends = (
        f"an answer ends at token {' or '.join(map(str, eos))}"
        if eos
        else "no token ends an answer"
    )
    return (
        f"{ends} by {GENERATION_CONFIG}, which goes before config.json, as in transformers: its "
        f"eos_token_id {', '.join(map(str, unused))} is not used",
    )
