"""A CTranslate2 model of a Llama shape with random int8 weights. Needs ctranslate2 and numpy.

    python scripts/peers/ctranslate2_int8.py write '{"hidden_size": 5120, …}' DIRECTORY
    python scripts/peers/ctranslate2_int8.py measure '{…}' DIRECTORY THREADS PROMPTS NEW_TOKENS

Its int8 quantizes activations as well (w8a8), and lm_head and the embedding too. `measure` prints
one line of JSON: tokens/s of each prefill, and of a decode after the first prompt.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec

# Windows into one random block, of primes apart: no two tensors are the same bytes.
_SHIFT = 34_283


def write(shape: dict[str, Any], folder: Path) -> None:
    """The directory that its converter would write."""
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        shape["num_hidden_layers"],
        heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=shape["rope_theta"],
        num_heads_kv=None if kv_heads == heads else kv_heads,
    )
    _fill(spec.decoder, shape, _Weights(shape))
    spec.config.layer_norm_epsilon = shape["rms_norm_eps"]
    spec.register_vocabulary(["<unk>", "<s>", "</s>", *_words(shape["vocab_size"])[3:]])
    spec.validate()
    folder.mkdir(parents=True)
    spec.save(str(folder))


class _Weights:
    """int8 tensors out of one random block, and scales that keep the logits small."""

    def __init__(self, shape: dict[str, Any]) -> None:
        most = max(3 * shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"])
        size = most * shape["hidden_size"] + _SHIFT * 8 * (shape["num_hidden_layers"] + 1)
        self._pool = np.random.default_rng(0).integers(-127, 128, size, dtype=np.int8)
        self._used = 0

    def fill(self, spec: Any, rows: int, columns: int) -> None:
        self._used += 1
        start = self._used * _SHIFT
        spec.weight = self._pool[start : start + rows * columns].reshape(rows, columns)
        # It divides by its scales.
        spec.weight_scale = np.full(rows, 73.6 * columns**0.5, dtype=np.float32)


def _fill(decoder: Any, shape: dict[str, Any], weights: _Weights) -> None:
    hidden, ffn, vocab = (shape[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    decoder.scale_embeddings = False
    weights.fill(decoder.embeddings, vocab, hidden)
    weights.fill(decoder.projection, vocab, hidden)
    norms = [decoder.layer_norm]
    for layer in decoder.layer:
        weights.fill(layer.self_attention.linear[0], hidden + 2 * kv, hidden)
        weights.fill(layer.self_attention.linear[1], hidden, hidden)
        weights.fill(layer.ffn.linear_0, ffn, hidden)
        weights.fill(layer.ffn.linear_0_noact, ffn, hidden)
        weights.fill(layer.ffn.linear_1, hidden, ffn)
        norms += [layer.self_attention.layer_norm, layer.ffn.layer_norm]
    for norm in norms:
        norm.gamma = np.ones(hidden, dtype=np.float32)


def measure(
    shape: dict[str, Any], folder: Path, threads: int, prompts: list[int], new_tokens: int
) -> dict[str, Any]:
    """Tokens/s of one run of each, after one that is not counted."""
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type="int8", intra_threads=threads, inter_threads=1
    )
    words = _words(shape["vocab_size"])
    found: dict[str, Any] = {"compute_type": generator.compute_type, "prefill": {}}
    _seconds(generator, words[3 : 3 + prompts[0]], 2)
    for length in prompts:
        found["prefill"][str(length)] = length / _seconds(generator, words[3 : 3 + length], 1)
    prompt = words[3 : 3 + prompts[0]]
    decode_s = _seconds(generator, prompt, new_tokens + 1) - _seconds(generator, prompt, 1)
    return {**found, "decode": new_tokens / decode_s}


def _seconds(generator: Any, prompt: list[str], new_tokens: int) -> float:
    start = time.perf_counter()
    generator.generate_batch(
        [prompt],
        max_length=new_tokens,
        min_length=new_tokens,
        sampling_topk=1,
        include_prompt_in_result=False,
    )
    return time.perf_counter() - start


def _words(vocab_size: int) -> list[str]:
    return [f"t{index}" for index in range(vocab_size)]


if __name__ == "__main__":
    command, shape, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    if command == "write":
        write(shape, folder)
    else:
        threads, prompts, new_tokens = (json.loads(word) for word in sys.argv[4:7])
        print(json.dumps(measure(shape, folder, threads, prompts, new_tokens)))
