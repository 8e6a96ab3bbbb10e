"""ModelConfig: what `config.json` says of a model, checked. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.errors import ModelError
from parallel.model.config_values import Values
from parallel.model.families import FAMILIES, NEUTRAL, Family
from parallel.model.rope_scaling import RopeScaling, read_rope
from parallel.model.windows import layer_windows

_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model of the Llama family; the names are those of `config.json`.

    Attributes:
        qk_norm: each head of q and of k is normed before it is rotated.
        windows: for each layer, how many positions a query sees, the last of them its own; None: all.
    """

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
    qk_norm: bool
    windows: tuple[int | None, ...]
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


class _Reader(Values):
    """Makes a ModelConfig of a config.json."""

    def read(self) -> ModelConfig:
        self._refuse_quantized()
        name, family = self._family()
        self._refuse_unsupported()
        return _Reader({**family.defaults, **self.values}, self.source)._config(name, family)

    def _config(self, name: str, family: Family) -> ModelConfig:
        hidden, heads = self.positive("hidden_size"), self.positive("num_attention_heads")
        kv_heads = self.positive("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self.error("num_key_value_heads", f"must divide {heads} heads", kv_heads)
        rope_theta, rope_scaling = read_rope(self)
        return ModelConfig(
            architecture=name,
            vocab_size=self.positive("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.positive("intermediate_size"),
            num_hidden_layers=self.positive("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=self._head_dim(hidden, heads),
            max_position_embeddings=self.positive("max_position_embeddings", 2048),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6, 1e-30, 1.0),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=self.boolean("tie_word_embeddings", False),
            qkv_bias=self._bias(family.qkv_bias, "attention_bias"),
            o_bias=(
                self.boolean("attention_bias", False) if family.o_bias is None else family.o_bias
            ),
            mlp_bias=self._bias(family.mlp_bias, "mlp_bias"),
            qk_norm=family.qk_norm,
            windows=layer_windows(self, family.window),
            dtype=self._dtype(),
            eos_token_ids=token_ids(self.values.get("eos_token_id"), self.source),
        )

    def _family(self) -> tuple[str, Family]:
        wanted = self._class_name().lower()
        found = next((name for name in FAMILIES if name.lower() == wanted), None)
        if found is None:
            rule = f"must name one of {', '.join(FAMILIES)} (write model.architectures=[NAME])"
            raise self.error("architectures", rule, self.values.get("architectures"))
        return found, FAMILIES[found]

    def _class_name(self) -> str:
        """`architectures`, also that of the bare decoder; where it is left out, what transformers'
        AutoModelForCausalLM makes of `model_type`."""
        names = self.values.get("architectures")
        name = names[0] if isinstance(names, list) and names else names
        if not name:
            return f"{self.values.get('model_type')}ForCausalLM"
        return re.sub("Model$", "ForCausalLM", str(name))

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

    def _refuse_unsupported(self) -> None:
        """The keys of another architecture's arithmetic."""
        for key, neutral in NEUTRAL.items():
            found = self.values.get(key)
            if found is not None and found not in neutral:
                wanted = neutral[0] if neutral else "null"
                raise self.error(key, f"must be {wanted}", found)

    def _head_dim(self, hidden: int, heads: int) -> int:
        if self.values.get("head_dim") is None and hidden % heads:
            raise self.error("hidden_size", f"must be a multiple of {heads} heads", hidden)
        head_dim = self.positive("head_dim", hidden // heads)
        if head_dim % 2:
            raise self.error("head_dim", "must be even", head_dim)
        return head_dim

    def _bias(self, fixed: bool | None, key: str) -> bool:
        """A family's own rule; a key of config.json that contradicts it is not passed over."""
        said = self.boolean(key, bool(fixed))
        if fixed is not None and key in self.values and said != fixed:
            raise self.error(key, f"must be {str(fixed).lower()} in this architecture", said)
        return said if fixed is None else fixed

    def _dtype(self) -> str:
        said = said_dtype(self.values)
        name = "float32" if said is None else said
        if name not in _DTYPES:
            raise self.error("torch_dtype", f"must be one of {', '.join(_DTYPES)}", name)
        return str(name)


def said_dtype(values: Mapping[str, Any]) -> object:
    """What a config.json says of the weights' dtype, in transformers 5's key or 4's; None: nothing,
    `auto`, which leaves it to the weights."""
    said = values.get("dtype")
    said = values.get("torch_dtype") if said is None else said
    name = said.removeprefix("torch.") if isinstance(said, str) else said
    return None if name == "auto" else name


def token_ids(value: object, source: str) -> tuple[int, ...]:
    """`eos_token_id` as it stands in JSON: null, a number, or a list of numbers (Llama 3).

    -1 is no token: some write it for none.
    """
    ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and item >= -1 for item in ids):
        rule = "must be a token id, -1 for none, or a list of ids"
        raise Values({}, source).error("eos_token_id", rule, value)
    return tuple(dict.fromkeys(item for item in ids if item >= 0))


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
