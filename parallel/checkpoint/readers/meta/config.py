"""Meta's `params.json` in the words of Hugging Face's `config.json`.

What it leaves out is decided as transformers' convert_llama_weights_to_hf.py does, where that asks its
user for the version: a vocabulary of Llama 3's size means Llama 3, `use_scaled_rope` 3.1 or later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parallel.checkpoint.json_file import read_json_object
from parallel.checkpoint.readers.meta.files import ConsolidatedFiles
from parallel.errors import CheckpointError

PARAMS = "params.json"
_KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "vocab_size", "rope_theta", "use_scaled_rope", "max_batch_size", "max_seq_len",
}  # fmt: skip
_LLAMA3_VOCAB = 128000
_LLAMA3_BOS = _LLAMA3_VOCAB
# End of text, of message, of turn: a base model writes the first alone, an instructed one each.
_LLAMA3_EOS = [128001, 128008, 128009]
# Of Llama 3.1; the two models of Llama 3.2, told by their width, stretch further.
_SCALE_FACTOR, _SCALE_FACTOR_3_2 = 8.0, 32.0
_WIDTHS_3_2 = (2048, 3072)
_MOST = 1 << 31


def read_meta_config(path: Path) -> dict[str, Any]:
    """The config of a directory of Meta's files.

    Raises:
        CheckpointError: params.json is broken, has keys that are not known, or does not fit the
            shapes of the tensors.
    """
    return _Converter(path / PARAMS, ConsolidatedFiles(path)).convert()


class _Converter:
    def __init__(self, path: Path, files: ConsolidatedFiles) -> None:
        self.path = path
        self.files = files
        self.params = read_json_object(path)
        for key in sorted(self.params.keys() - _KNOWN):
            raise self._error(f"has the key {key[:200]!r}, which is not read; add a config.json")

    def convert(self) -> dict[str, Any]:
        vocab = self._vocab_size()
        is_llama3 = vocab >= _LLAMA3_VOCAB
        heads = self._integer("n_heads")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": self._integer("dim"),
            "intermediate_size": self._intermediate_size(),
            "num_hidden_layers": self._integer("n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer("n_kv_heads", heads),
            "max_position_embeddings": self._context(is_llama3),
            "rms_norm_eps": self._number("norm_eps", 1e-5),
            "rope_theta": self._theta(),
            "rope_scaling": self._rope_scaling(),
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in self.files.tensors,
            "bos_token_id": _LLAMA3_BOS if is_llama3 else 1,
            "eos_token_id": _LLAMA3_EOS if is_llama3 else 2,
            "torch_dtype": self.files.tensors["model.norm.weight"].dtype,
        }

    def _vocab_size(self) -> int:
        """Llama 1 and 2 say -1: their tokenizer knows, and so do the tensors."""
        found = self.files.tensors["model.embed_tokens.weight"].shape[0]
        if self.params.get("vocab_size", -1) not in (-1, found):
            raise self._error(
                f"says vocab_size {self._integer('vocab_size')}, but the embeddings of "
                f"{len(self.files.files)} consolidated files have {found} rows; download all files "
                "of the model"
            )
        return found

    def _intermediate_size(self) -> int:
        """Two thirds of four times the width, stretched, and rounded up to a multiple."""
        multiple = self._integer("multiple_of", 256)
        stretch = self._number("ffn_dim_multiplier", 1.0)
        size = int(stretch * int(8 * self._integer("dim") / 3))
        size = -(-size // multiple) * multiple
        gate = self.files.tensors.get("model.layers.0.mlp.gate_proj.weight")
        if gate is None or gate.shape[0] != size:
            raise self._error(
                f"asks for {size} rows of feed_forward.w1, but the {len(self.files.files)} "
                f"consolidated files add up to {gate.shape[0] if gate else 'none'}; download all "
                "files of the model, or add a config.json"
            )
        return size

    def _context(self, is_llama3: bool) -> int:
        """Code Llama and Llama 2 both have a small vocabulary; the former's base is larger."""
        if self._is_scaled():
            return 131072
        if is_llama3:
            return 8192
        return 16384 if self._theta() > 10000.0 else 4096

    def _rope_scaling(self) -> dict[str, Any] | None:
        if not self._is_scaled():
            return None
        is_3_2 = self._integer("dim") in _WIDTHS_3_2
        return {
            "rope_type": "llama3",
            "factor": _SCALE_FACTOR_3_2 if is_3_2 else _SCALE_FACTOR,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }

    def _is_scaled(self) -> bool:
        value = self.params.get("use_scaled_rope", False)
        if type(value) is not bool:
            raise self._error(
                f"must say true or false of use_scaled_rope, but says {_shown(value)}"
            )
        return value

    def _theta(self) -> float:
        return self._number("rope_theta", 10000.0)

    def _integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int or not 0 < value < _MOST:
            raise self._error(f"must say a positive integer for {key}, but says {_shown(value)}")
        return value

    def _number(self, key: str, default: float) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 < value < _MOST:
            raise self._error(f"must say a positive number for {key}, but says {_shown(value)}")
        return float(value)

    def _value(self, key: str, default: object) -> Any:
        value = self.params.get(key)
        return default if value is None else value

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}.")


def _shown(value: object) -> str:
    return repr(value)[:200]
