"""ModelConfig: what `config.json` says of a model, checked. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.errors import ModelError
from parallel.model.families import FAMILIES, Family
from parallel.model.rope_scaling import RopeScaling, parse_rope_scaling

_DTYPES = ("bfloat16", "float16", "float32")
# Far above any model, and low enough that a damaged number is refused before it is counted up to.
_MOST = {"num_hidden_layers": 4096, "num_attention_heads": 65536}
_MOST_SIZE = 2**31 - 1
# Characters of a damaged value that a message shows.
_LONGEST_VALUE = 200


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model of the Llama family; the names are those of `config.json`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read the contents of a Hugging Face `config.json`.

        Args:
            values: the parsed JSON object; transformers 4 and 5 forms are both read.
            source: what to call the file in an error.

        Raises:
            ModelError: an unknown architecture, a missing or impossible value, or a
                `quantization_config` of a method that is not read.
        """
        return _Reader(values, source).read()

    def check_tp(self, tp: int) -> None:
        """Raise ModelError unless the heads can be dealt out to `tp` ranks."""
        if tp in (valid := self.valid_tp_sizes()):
            return
        raise ModelError(
            f"`parallel.tp` must divide num_attention_heads ({self.num_attention_heads}), and divide "
            f"or be divided by num_key_value_heads ({self.num_key_value_heads}), but is {tp}; "
            f"valid sizes: {', '.join(map(str, valid))}."
        )

    def valid_tp_sizes(self) -> tuple[int, ...]:
        """The tensor-parallel sizes this model can be split by."""
        kv = self.num_key_value_heads
        sizes = range(1, self.num_attention_heads + 1)
        return tuple(
            tp
            for tp in sizes
            if self.num_attention_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0)
        )


class _Reader:
    """Takes values out of a config.json; each `_get` is one check with one sentence."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def read(self) -> ModelConfig:
        self._refuse_quantized()
        name, family = self._family()
        self._refuse_unsupported(family)
        hidden, heads = self._positive("hidden_size"), self._positive("num_attention_heads")
        kv_heads = self._positive("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self._error("num_key_value_heads", f"must divide {heads} heads", kv_heads)
        rope_theta, rope_scaling = self._rope()
        return ModelConfig(
            architecture=name,
            vocab_size=self._positive("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self._positive("intermediate_size"),
            num_hidden_layers=self._positive("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=self._head_dim(hidden, heads),
            max_position_embeddings=self._positive("max_position_embeddings", 2048),
            rms_norm_eps=self._number("rms_norm_eps", 1e-6, 1e-30, 1.0),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=self._bool("tie_word_embeddings", False),
            qkv_bias=self._bias(family.qkv_bias, "attention_bias"),
            o_bias=(
                self._bool("attention_bias", False) if family.o_bias is None else family.o_bias
            ),
            mlp_bias=self._bias(family.mlp_bias, "mlp_bias"),
            dtype=self._dtype(),
            eos_token_ids=token_ids(self.values.get("eos_token_id"), self.source),
        )

    def _family(self) -> tuple[str, Family]:
        names = self.values.get("architectures") or ["(none)"]
        if not isinstance(names, list) or not isinstance(names[0], str) or names[0] not in FAMILIES:
            shown = names[0] if isinstance(names, list) else names
            raise self._error("architectures", f"must be one of {', '.join(FAMILIES)}", shown)
        return names[0], FAMILIES[names[0]]

    def _refuse_quantized(self) -> None:
        # compressed-tensors called it compression_config at first.
        keys = ("quantization_config", "compression_config")
        quantization = next((self.values[key] for key in keys if key in self.values), None)
        if quantization is None:
            return
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelError(
            f"{self.source} has a quantization_config of method {method!r}, which is not read; "
            "give the unquantized checkpoint and quantize it with quant=rtn_a16w8."
        )

    def _refuse_unsupported(self, family: Family) -> None:
        rope = self.values.get("rope_parameters")
        for key, only in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
            for values in (self.values, rope if isinstance(rope, dict) else {}):
                if values.get(key, only) != only:
                    raise self._error(key, f"must be {only}", values[key])
        self._refuse_sliding_window(family)

    def _refuse_sliding_window(self, family: Family) -> None:
        window = self.values.get("sliding_window")
        key = family.sliding_window_key
        if window is None or (key and not self.values.get(key, False)):
            return
        context = self._positive("max_position_embeddings", 2048)
        if self._positive("sliding_window") < context:
            raise self._error("sliding_window", f"must be null or at least {context}", window)

    def _rope(self) -> tuple[float, RopeScaling | None]:
        """transformers 5 keeps theta and scaling together under `rope_parameters`."""
        together = self.values.get("rope_parameters")
        if together is not None and not isinstance(together, dict):
            raise self._error("rope_parameters", "must be an object or null", together)
        if together is not None:
            self._refuse_second_scaling(together)
            outer = {"rope_theta": self.values.get("rope_theta")}
            values = _Reader({**outer, **together}, f"{self.source}: rope_parameters")
            return values._theta(), parse_rope_scaling(together, self.source)
        return self._theta(), parse_rope_scaling(self.values.get("rope_scaling"), self.source)

    def _refuse_second_scaling(self, together: Mapping[str, Any]) -> None:
        second = self.values.get("rope_scaling")
        if parse_rope_scaling(second, self.source) not in (
            None,
            parse_rope_scaling(together, self.source),
        ):
            raise self._error("rope_scaling", "must not contradict rope_parameters", second)

    def _theta(self) -> float:
        return self._number("rope_theta", 10000.0, 1.0, 1e30)

    def _head_dim(self, hidden: int, heads: int) -> int:
        if self.values.get("head_dim") is None and hidden % heads:
            raise self._error("hidden_size", f"must be a multiple of {heads} heads", hidden)
        head_dim = self._positive("head_dim", hidden // heads)
        if head_dim % 2:
            raise self._error("head_dim", "must be even", head_dim)
        return head_dim

    def _bias(self, fixed: bool | None, key: str) -> bool:
        """A family's own rule; a key of config.json that contradicts it is not passed over."""
        said = self._bool(key, bool(fixed))
        if fixed is not None and key in self.values and said != fixed:
            raise self._error(key, f"must be {str(fixed).lower()} in this architecture", said)
        return said if fixed is None else fixed

    def _dtype(self) -> str:
        name = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        if name not in _DTYPES:
            raise self._error("torch_dtype", f"must be one of {', '.join(_DTYPES)}", name)
        return str(name)

    def _positive(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        most = _MOST.get(key, _MOST_SIZE)
        if type(value) is not int or not 1 <= value <= most:
            raise self._error(key, f"must be an integer of 1 to {most}", value)
        return value

    def _number(self, key: str, default: float, least: float, most: float) -> float:
        """A number that float32 arithmetic can take."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not least <= value <= most:
            raise self._error(key, f"must be a number of {least:g} to {most:g}", value)
        return float(value)

    def _bool(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self._error(key, "must be true or false", value)
        return value

    def _error(self, key: str, rule: str, value: object) -> ModelError:
        shown = repr(value)
        shown = shown if len(shown) <= _LONGEST_VALUE else shown[:_LONGEST_VALUE] + "…"
        return ModelError(f"{self.source}: {key} {rule}, but is {shown}.")


def token_ids(value: object, source: str) -> tuple[int, ...]:
    """`eos_token_id` as it stands in JSON: null, a number, or a list of numbers (Llama 3)."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise ModelError(f"{source}: eos_token_id must be a token id or a list, but is {value!r}.")
    return tuple(ids)


def override_config(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with some values replaced, also those that transformers 5 keeps together."""
    together = values.get("rope_parameters")
    if isinstance(together, dict) and {"rope_theta", "rope_scaling"} & overrides.keys():
        scaling = overrides.get("rope_scaling", together)
        theta = overrides.get("rope_theta", together.get("rope_theta", 10000.0))
        values = {**values, "rope_parameters": {**scaling, "rope_theta": theta}}
    if "torch_dtype" in overrides:
        values = {key: value for key, value in values.items() if key != "dtype"}
    return {**values, **overrides}
