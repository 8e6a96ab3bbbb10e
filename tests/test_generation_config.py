"""generation_config.json: what ends an answer, and what of it is not used, is said."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.generation_notes import generation_notes
from launcher.schema import GenerationSection
from parallel.checkpoint.generation_config import NEUTRAL, read_generation_defaults
from parallel.checkpoint.open import open_checkpoint
from parallel.errors import CheckpointError, ModelError
from tests.checkpoints import write_checkpoint
from tests.models import generate

# Attributes of transformers' GenerationConfig that make no other text, and why.
SAME_TEXT = {
    **dict.fromkeys(
        ("use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile",
         "low_memory", "prefill_chunk_size", "continuous_batching_config"),
        "how the same numbers are computed",
    ),
    "cache_implementation": "where the same keys and values lie",
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits",
         "return_dict_in_generate"),
        "what is returned beside the text",
    ),
    "num_return_sequences": "how many answers a prompt has",
    **dict.fromkeys(
        ("use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
         "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
         "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
         "assistant_ensemble_weight", "speculation_type"),
        "guesses that the model itself confirms",
    ),
    "pad_token_id": "what stands in no sequence",
    "bos_token_id": "the tokenizer's to add; a prompt is never empty here",
    "decoder_start_token_id": "for encoder-decoder models",
    "eos_token_id": "read",
    "transformers_version": "who wrote it",
}  # fmt: skip


def test_every_key_of_transformers_changes_the_text_or_is_known_not_to():
    """A key that a later transformers knows is put where it belongs."""
    transformers = pytest.importorskip("transformers", minversion="5.24")
    names = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert NEUTRAL.keys() | SAME_TEXT.keys() >= names
    assert not NEUTRAL.keys() & SAME_TEXT.keys()


def test_values_that_change_nothing_are_the_defaults_of_transformers():
    transformers = pytest.importorskip("transformers", minversion="5.24")
    defaults = transformers.GenerationConfig()._get_default_generation_params()
    for key in NEUTRAL.keys() & defaults.keys():
        assert NEUTRAL[key] == defaults[key], key


def test_every_key_of_our_own_that_theirs_has_is_one_of_them():
    ours = {field.name for field in fields(GenerationSection)}
    own = {"seed", "stop", "ignore_eos", "max_num_seqs", "prefill_chunk"}
    assert own < ours
    assert ours - own <= NEUTRAL.keys()


def write_generation(path: Path, values: object, **config: Any) -> Path:
    write_checkpoint(path, **config)
    (path / "generation_config.json").write_text(json.dumps(values))
    return path


def notes(path: Path, **section: Any) -> list[str]:
    return list(generation_notes(open_checkpoint(path), GenerationSection(**section)))


CHANGES = {
    "suppress_tokens": [432, 383],
    "begin_suppress_tokens": [5],
    "bad_words_ids": [[286, 261]],
    "min_length": 3,
    "min_new_tokens": 20,
    "num_beams": 4,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "top_h": 0.4,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 0,
    "exponential_decay_length_penalty": [10, 1.1],
    "sequence_bias": [[[3], -1.0]],
    "guidance_scale": 1.5,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "length_penalty": 0.5,
    "diversity_penalty": 0.3,
    "watermarking_config": {"bias": 2.5},
    "dola_layers": "low",
    "token_healing": True,
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_that_is_not_known_here_is_named_with_its_value(tmp_path, key):
    path = write_generation(tmp_path, {"eos_token_id": 2, key: CHANGES[key]})
    (note,) = notes(path)
    start = f"the checkpoint's generation_config.json says {key}="
    assert note.startswith(start)
    assert "no such key here" in note
    assert len(note) < 400


SETTABLE = {
    "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3,
    "max_new_tokens": 512, "max_length": 4096,
}  # fmt: skip


@pytest.mark.parametrize("key", SETTABLE)
def test_a_key_that_the_run_can_set_is_named_with_that_unless_it_is_set_so(tmp_path, key):
    path = write_generation(tmp_path, {key: SETTABLE[key]})
    (note,) = notes(path)
    assert note.endswith(f"says {key}={SETTABLE[key]!r}: not used, set generation.{key}")
    assert notes(path, **{key: SETTABLE[key]}) == []


def test_stop_strings_are_set_by_the_name_that_they_have_here(tmp_path):
    path = write_generation(tmp_path, {"stop_strings": ["Lily"]})
    assert notes(path)[0].endswith("not used, set generation.stop")
    assert notes(path, stop=["Lily"]) == []


def test_the_notes_shrink_as_the_section_gains_keys(tmp_path):
    @dataclass
    class Later(GenerationSection):
        min_p: float = 0.0

    checkpoint = open_checkpoint(write_generation(tmp_path, {"min_p": 0.1, "num_beams": 2}))
    settable, unknown = generation_notes(checkpoint, Later())
    assert "min_p=0.1: not used, set generation.min_p" in settable
    assert "num_beams" in unknown
    assert "min_p" not in unknown


def test_values_that_change_nothing_are_not_named(tmp_path):
    path = write_generation(tmp_path, {**NEUTRAL, "bad_words_ids": [], "unheard_of": 3})
    assert notes(path) == []


def test_a_long_value_and_a_strange_one_are_shown_short_and_on_one_line(tmp_path):
    path = write_generation(
        tmp_path, {"suppress_tokens": list(range(100_000)), "stop_strings": ["\x1b[2J\n" * 1000]}
    )
    for note in notes(path):
        assert len(note) < 400
        assert note.isprintable()


def test_config_json_stands_in_for_a_generation_config_that_is_not_there(tmp_path):
    """As in transformers: of such models it holds the defaults, and goes unread beside the file."""
    path = write_checkpoint(tmp_path, no_repeat_ngram_size=2, do_sample=True)
    first, second = notes(path)
    assert first.startswith("the checkpoint's config.json says do_sample=True: not used")
    assert "config.json says no_repeat_ngram_size=2" in second
    (path / "generation_config.json").write_text("{}")
    assert notes(path) == []


# What ends an answer


@pytest.mark.parametrize(
    ("config", "generation", "eos"),
    [
        (426, {"eos_token_id": 2}, (2,)),
        (426, {"eos_token_id": [2, 426]}, (2, 426)),
        ([2, 426], {"eos_token_id": 2}, (2,)),
        (426, {"eos_token_id": -1}, ()),
        (426, None, (426,)),
        # transformers would never stop here.
        (426, {}, (426,)),
        (426, {"eos_token_id": None}, (426,)),
        (None, {"eos_token_id": 2}, (2,)),
    ],
)
def test_ends_are_those_of_generation_config_where_it_has_some(tmp_path, config, generation, eos):
    path = write_checkpoint(tmp_path, eos_token_id=config)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    checkpoint = open_checkpoint(path)
    assert checkpoint.eos_token_ids == eos
    listed = config if isinstance(config, list) else [config] if config else []
    unused = [number for number in listed if number not in eos]
    assert len(checkpoint.notes) == bool(unused)
    for note in checkpoint.notes:
        assert note.endswith(f"its eos_token_id {unused[0]} is not used")


@pytest.mark.parametrize("eos", [2, [2, 426], 426])
def test_answers_end_where_those_of_transformers_do(shared, tmp_path, eos):
    transformers = pytest.importorskip("transformers")
    plain = shared / "checkpoints/stories260K/hf"
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copyfile(plain / name, tmp_path / name)
    edit(tmp_path / "config.json", eos_token_id=426)
    edit(tmp_path / "generation_config.json", eos_token_id=eos)
    prompts = [[1, 403, 407, 261, 378], [1, 410, 408], [1, 322]]
    found = generate(tmp_path, prompts, 2, new_tokens=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        for index, ids in enumerate(prompts):
            whole = model.generate(torch.tensor([ids]), max_new_tokens=40, pad_token_id=0)
            assert list(found[index].token_ids) == whole[0, len(ids) :].tolist()


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Files that are none


@pytest.mark.parametrize("text", ["[1, 2]", "3", "null", "{", "", "\x00", "[" * 100_000])
def test_a_file_that_holds_no_object_is_refused_in_a_sentence(tmp_path, text):
    path = write_checkpoint(tmp_path)
    (path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        open_checkpoint(path)


def test_values_of_every_type_are_shown_or_refused_in_a_sentence(tmp_path):
    rng = random.Random(0)
    kinds = (None, True, -1, 3, 0.5, "x", [], [1], [[1]], {}, {"a": [1]}, 1e400, "\n", [None])
    num_read, refusals = 0, []
    for _ in range(300):
        keys = rng.sample([*NEUTRAL, "eos_token_id"], 5)
        (tmp_path / "generation_config.json").write_text(
            json.dumps({key: rng.choice(kinds) for key in keys})
        )
        try:
            defaults = read_generation_defaults(tmp_path, {}, (2,))
        except ModelError as error:
            refusals.append(str(error))
            continue
        assert defaults.changes.keys() <= set(keys)
        num_read += 1
    assert num_read > 100
    assert all("eos_token_id must be" in refusal for refusal in refusals)
