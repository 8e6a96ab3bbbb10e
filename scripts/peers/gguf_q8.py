"""Write a GGUF of a Llama shape with random Q8_0 weights, for llama.cpp. Needs gguf and numpy.

    python scripts/peers/gguf_q8.py '{"hidden_size": 5120, …}' FILE

Q8_0 keeps a float16 scale for each 32 int8 values; lm_head and the embedding are Q8_0 as well, as
llama.cpp's own converter makes them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_BLOCK, _BLOCK_BYTES = 32, 34
# Windows into one random block, of primes apart: no two tensors are the same bytes.
_SHIFT = 34 * 1009


def main(shape: dict[str, Any], path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    _write_header(writer, shape)
    tensors = list(_tensors(shape))
    most = max(rows * columns for _, rows, columns in tensors) // _BLOCK * _BLOCK_BYTES
    pool = _random_blocks(most + _SHIFT * len(tensors), shape["hidden_size"])
    for index, (name, rows, columns) in enumerate(tensors):
        row_bytes = columns // _BLOCK * _BLOCK_BYTES
        data = pool[index * _SHIFT :][: rows * row_bytes].reshape(rows, row_bytes)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in _norms(shape):
        writer.add_tensor(name, np.ones(shape["hidden_size"], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_header(writer: Any, shape: dict[str, Any]) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_dimension_count(shape["hidden_size"] // shape["num_attention_heads"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _tensors(shape: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of each quantized tensor."""
    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "token_embd.weight", shape["vocab_size"], hidden
    yield "output.weight", shape["vocab_size"], hidden
    for layer in range(shape["num_hidden_layers"]):
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("output", hidden)):
            yield f"blk.{layer}.attn_{name}.weight", rows, hidden
        yield f"blk.{layer}.ffn_gate.weight", ffn, hidden
        yield f"blk.{layer}.ffn_up.weight", ffn, hidden
        yield f"blk.{layer}.ffn_down.weight", hidden, ffn


def _norms(shape: dict[str, Any]) -> Iterator[str]:
    yield "output_norm.weight"
    for layer in range(shape["num_hidden_layers"]):
        yield f"blk.{layer}.attn_norm.weight"
        yield f"blk.{layer}.ffn_norm.weight"


def _random_blocks(num_bytes: int, hidden_size: int) -> Any:
    """uint8 [num_bytes]: random integers, each 32 of them with the scale that keeps logits small."""
    blocks = np.random.default_rng(0).integers(
        0, 256, (num_bytes // _BLOCK_BYTES + 1, _BLOCK_BYTES), dtype=np.uint8
    )
    scale = np.float16(1 / (73.6 * hidden_size**0.5))
    blocks[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return blocks.reshape(-1)[:num_bytes]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
