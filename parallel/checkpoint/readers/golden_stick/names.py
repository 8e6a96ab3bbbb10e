"""What Golden Stick calls the parts of a quantized linear and of a KV cache. Needs no torch.

Its networks wrap a linear in cells of their own, and a parameter is called by the cells that it lies
in, so one part has several names: RTN 0.6 keeps a linear's own name for its integers, PTQ 1.x puts
them below `_layer`. A name is a MindFormers module followed by one of these suffixes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.checkpoint.readers.mindformers.names import hf_modules, hf_names

# What a part is, whatever it is called.
WEIGHT, BIAS = "weight", "bias"
SCALE, ZERO = "scale", "zero point"
# The weight's scale times the input's, and what a zero point of the input adds to the sums.
PRODUCT_SCALE, CORRECTION = "dequant scale", "bias of zero points"
INPUT_SCALE, INPUT_ZERO = "input scale", "input zero point"
SMOOTH, SHIFT, ORDER = "smoothing of the input", "shift of the input", "order of the columns"
KEY_SCALE, KEY_ZERO = "key scale", "key zero point"
VALUE_SCALE, VALUE_ZERO = "value scale", "value zero point"

_WRAPPED = {
    "weight": WEIGHT, "bias": BIAS, "weight_bias": CORRECTION, "quant_bias": CORRECTION,
}  # fmt: skip
_PRODUCT = {
    "t_scale": SCALE, "t_zp_neg": ZERO, "weight_scale": SCALE, "weight_zp": ZERO,
    "dequant_scale": PRODUCT_SCALE, "quant_bias": CORRECTION, "smooth_scale": SMOOTH,
    "mul_scale": SMOOTH, "perm": ORDER,
}  # fmt: skip
_INPUT = {"input_scale": INPUT_SCALE, "input_zp": INPUT_ZERO, "beta": SHIFT, "smooth_scale": SMOOTH}
_LINEAR_SUFFIXES: Mapping[str, str] = {
    **_WRAPPED,
    **{f"_layer.{name}": kind for name, kind in _WRAPPED.items()},
    "_handler.weight": WEIGHT, "_handler.bias": BIAS,
    "_weight_quantizer.scale": SCALE, "_weight_quantizer.zp_neg": ZERO,
    **{f"matmul.{name}": kind for name, kind in _PRODUCT.items()},
    **{f"_layer.matmul.{name}": kind for name, kind in _PRODUCT.items()},
    **_INPUT, "perm": ORDER,
    **{f"quant_op.{name}": kind for name, kind in _INPUT.items()},
}  # fmt: skip
_CACHE_SUFFIXES: Mapping[str, str] = {
    "key_t_scale": KEY_SCALE, "key_t_zp": KEY_ZERO,
    "value_t_scale": VALUE_SCALE, "value_t_zp": VALUE_ZERO,
    "quant_pa.k_scale_no_fusion": KEY_SCALE, "quant_pa.k_zp_no_fusion": KEY_ZERO,
    "quant_pa.v_scale_no_fusion": VALUE_SCALE, "quant_pa.v_zp_no_fusion": VALUE_ZERO,
}  # fmt: skip
# The same numbers once more, for other operators of MindSpore's: of keys and values in one, or apart.
BOTH_SCALES, BOTH_ZEROS = "copy of both scales", "copy of both zero points"
KEY_SCALE_COPY, VALUE_SCALE_COPY = "copy of the key scale", "copy of the value scale"
KEY_ZERO_COPY, VALUE_ZERO_COPY = "copy of the key zero point", "copy of the value zero point"
_COPY_SUFFIXES: Mapping[str, str] = {
    "key_value_t_scale": BOTH_SCALES, "key_value_t_zp": BOTH_ZEROS,
    "quant_pa.k_v_scale_fusion": BOTH_SCALES, "quant_pa.k_v_zp_fusion": BOTH_ZEROS,
    "_key_input_quantizer.t_scale": KEY_SCALE_COPY, "_key_input_quantizer.t_zp": KEY_ZERO_COPY,
    "_value_input_quantizer.t_scale": VALUE_SCALE_COPY, "_value_input_quantizer.t_zp": VALUE_ZERO_COPY,
}  # fmt: skip
_ATTENTION = ".attention."
_PLAIN = (WEIGHT, BIAS)


@dataclass(frozen=True)
class Part:
    """What a tensor is.

    Attributes:
        modules: Hugging Face's names of the modules that it belongs to, one after the other along
            the output channels where they are fused; the attention of a layer for a cache's parts.
        kind: one of the words above.
    """

    modules: tuple[str, ...]
    kind: str


def parse_name(name: str) -> Part | None:
    """What a tensor of theirs is, by its name; None: it is not known."""
    if plain := hf_names(name):
        kind = plain[0].rpartition(".")[2]
        return Part(tuple(item.rpartition(".")[0] for item in plain), kind)
    return _linear_part(name) or _cache_part(name)


def is_quantized_name(name: str) -> bool:
    """Whether it is one that only a quantized checkpoint has."""
    part = parse_name(name)
    return part is not None and (part.kind not in _PLAIN or not hf_names(name))


def _linear_part(name: str) -> Part | None:
    words = name.split(".")
    for length in (1, 2, 3):
        kind = _LINEAR_SUFFIXES.get(".".join(words[-length:]))
        modules = hf_modules(".".join(words[:-length]))
        if kind and modules:
            return Part(modules, kind)
    return None


def _cache_part(name: str) -> Part | None:
    """Below the attention, in cells whose names depend on MindFormers' release."""
    layer, found, rest = name.partition(_ATTENTION)
    suffixes = {**_CACHE_SUFFIXES, **_COPY_SUFFIXES}
    kinds = [kind for suffix, kind in suffixes.items() if f".{rest}".endswith(f".{suffix}")]
    modules = hf_modules(f"{layer}{_ATTENTION}wq")
    if not (found and kinds and modules):
        return None
    return Part((modules[0].rpartition(".")[0],), kinds[0])
