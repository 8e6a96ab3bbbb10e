"""What is quantized, to what, and how: the contents of `quant.*` and of a `quantization_config`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from quant.errors import QuantError
from quant.layer_policies import check_unquantized, policy_fields
from quant.module_patterns import match_or_refuse
from quant.scheme_checks import check_scheme, in_words, nearest


@dataclass(frozen=True)
class LinearScheme:
    """How one linear is quantized.

    Attributes:
        weight_dtype: int8 or int4.
        group_size: columns that share a scale; None: a whole row does.
        activation_dtype: int8 where the product quantizes its activations too, else None.
        act_granularity: per_token (each row by itself, dynamic) or per_tensor (static).
    """

    weight_dtype: str
    group_size: int | None = None
    activation_dtype: str | None = None
    act_granularity: str = "per_token"

    @property
    def bits(self) -> int:
        return 8 // self.values_per_byte

    @property
    def values_per_byte(self) -> int:
        """How many columns a byte holds where the weight is stored."""
        return {"int8": 1, "int4": 2}[self.weight_dtype]

    @property
    def is_static(self) -> bool:
        """Whether its activations have one scale, which calibration gave."""
        return self.activation_dtype is not None and self.act_granularity == "per_tensor"

    @property
    def label(self) -> str:
        """The field's short name: `w8a16`, `w8a8`, `w4a16`, `w4a16 g128`.

        What a kernel is chosen by: static activations cost what dynamic ones do.
        """
        name = f"w{self.bits}a{'16' if self.activation_dtype is None else '8'}"
        return name if self.group_size is None else f"{name} g{self.group_size}"

    @property
    def full_label(self) -> str:
        """The label, and whether activations are static: `w8a8 static`."""
        return f"{self.label} static" if self.is_static else self.label


@dataclass(frozen=True)
class QuantScheme:
    """One quantization scheme; the fields are those of the `quant` configuration group.

    Raises QuantError for a value outside its list and for a combination that cannot be computed:
    nothing is silently left unquantized.
    """

    quant_method: str | None = None
    weight_dtype: str | None = None
    activation_dtype: str | None = None
    kvcache_dtype: str | None = None
    outliers_suppression: str | None = None
    precision_recovery: str | None = None
    modules_to_not_convert: tuple[str, ...] = ("lm_head",)
    algorithm_args: Mapping[str, Any] = field(default_factory=dict)
    weight_quant_granularity: str = "per_channel"
    group_size: int | None = None
    act_quant_granularity: str = "per_token"
    kvcache_quant_granularity: str = "per_token"
    layer_policies: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_scheme(self)
        for policy in self.layer_policies:
            self._under(policy)

    @property
    def quantizes_weights(self) -> bool:
        return self.weight_dtype is not None or any(
            policy.get("weight_dtype") is not None for policy in self.layer_policies
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether it takes texts to quantize so."""
        linears = [
            self._linear(),
            *(self._under(policy)._linear() for policy in self.layer_policies),
        ]
        is_static = any(linear is not None and linear.is_static for linear in linears)
        has_static_cache = (
            self.kvcache_dtype is not None and self.kvcache_quant_granularity == "per_channel"
        )
        return self.quant_method in ("smooth_quant", "ptq") or is_static or has_static_cache

    @property
    def kv_granularity(self) -> str | None:
        """per_token or per_channel where the KV cache is int8; None: it is in the compute dtype."""
        return self.kvcache_quant_granularity if self.kvcache_dtype else None

    def kv_bytes(self, head_dim: int, float_bytes: int) -> int:
        """Bytes of one position's key, or value, of a head in the KV cache, with a scale of its own.

        Args:
            float_bytes: of a number in the compute dtype.
        """
        if self.kv_granularity is None:
            return head_dim * float_bytes
        return head_dim + (_KV_SCALE_BYTES if self.kv_granularity == "per_token" else 0)

    @property
    def label(self) -> str:
        """The field's short name of the scheme, such as `w4a16 g128` or `w8a16 c8`; `none`.

        `mixed` where there are policies; c8 is an int8 KV cache, `c8 static` one that was calibrated.
        """
        base = self._linear()
        parts = [base.full_label] if base else []
        parts += ["mixed"] if self.layer_policies and self.quantizes_weights else []
        granularity = self.kv_granularity
        parts += [] if granularity is None else [_KV_LABELS[granularity]]
        return " ".join(parts) or "none"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON and YAML values; `from_dict` of the result is equal to this scheme."""
        values = asdict(self)
        values["modules_to_not_convert"] = list(self.modules_to_not_convert)
        values["layer_policies"] = [dict(policy) for policy in self.layer_policies]
        values["algorithm_args"] = dict(self.algorithm_args)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantScheme:
        """Build from a mapping such as a manifest's; an unknown key is an error.

        Words are taken in any case: `RTN`, `Smooth_Quant`, `INT8`.
        """
        known = {item.name for item in fields(cls)}
        for key in values:
            if key not in known:
                raise QuantError(f"`quant.{key}` is not a key; {nearest(key, known)}")
        values = {key: in_words(key, value) for key, value in values.items()}
        values |= {key: _tuple(values, key) for key in _TUPLES if key in values}
        if type(values.get("group_size")) is int and values["group_size"] == 0:
            values["group_size"] = None  # Golden Stick's word for none
        return cls(**values)

    def for_modules(self, modules: Iterable[str]) -> dict[str, LinearScheme | None]:
        """The scheme of each module, in their order; None: it is left unquantized.

        `modules_to_not_convert` comes first, then the first policy whose pattern matches, then the
        scheme itself.

        Raises:
            QuantError: a pattern that decides of no module, or that nothing would be quantized.
        """
        modules = tuple(modules)
        if not self.quantizes_weights:
            return dict.fromkeys(modules)
        left_out = self.left_out(modules)
        found: dict[str, LinearScheme | None] = dict.fromkeys(left_out)
        for place, policy in enumerate(self.layer_policies):
            found |= self._decided(place, policy, modules, found, left_out)
        rest = self._linear()
        schemes = {name: found.get(name, rest) for name in modules}
        if not any(schemes.values()):
            raise QuantError(
                "`quant` would leave every module unquantized; drop a pattern of "
                "quant.modules_to_not_convert or quant.layer_policies, or write quant=none."
            )
        return schemes

    def left_out(self, modules: Iterable[str]) -> frozenset[str]:
        """The modules that `modules_to_not_convert` leaves unquantized.

        A pattern matches the whole module path or its last component (fnmatch). Raises QuantError
        for a pattern that matches no module: it would be ignored, and the user would not know.
        """
        modules = tuple(modules)
        matched: set[str] = set()
        for pattern in self.modules_to_not_convert:
            matched |= match_or_refuse("modules_to_not_convert", pattern, modules)
        if len(matched) == len(modules):
            raise QuantError(
                f"`quant.modules_to_not_convert` matches every module with "
                f"{list(self.modules_to_not_convert)!r}, so nothing would be quantized; drop a "
                "pattern, or write quant=none."
            )
        return frozenset(matched)

    def _decided(
        self,
        place: int,
        policy: Mapping[str, Any],
        modules: tuple[str, ...],
        before: Mapping[str, LinearScheme | None],
        left_out: frozenset[str],
    ) -> dict[str, LinearScheme | None]:
        """The modules of which this policy is the first to decide."""
        key, pattern = f"layer_policies[{place}]", policy["pattern"]
        hits = match_or_refuse(key, pattern, modules)
        if hits <= left_out:
            raise QuantError(
                f"`quant.{key}` has the pattern {pattern!r}, all of whose modules "
                "quant.modules_to_not_convert leaves unquantized; drop them there, or drop the policy."
            )
        if hits <= before.keys():
            raise QuantError(
                f"`quant.{key}` has the pattern {pattern!r}, all of whose modules an earlier policy "
                "takes (the first match wins); put it before that one, or drop it."
            )
        return dict.fromkeys(hits - before.keys(), self._under(policy)._linear())

    def _linear(self) -> LinearScheme | None:
        """The scheme of a module that nothing else is said of."""
        if self.weight_dtype is None:
            return None
        return LinearScheme(
            self.weight_dtype, self.group_size, self.activation_dtype, self.act_quant_granularity
        )

    def _under(self, policy: object) -> QuantScheme:
        """The scheme with a policy's fields in place of its own: checked as any other is.

        Raises:
            QuantError: the policy is none, or what it makes of the scheme cannot be computed.
        """
        said = policy_fields(policy)
        if said.get("weight_dtype", self.weight_dtype) is None:
            check_unquantized(policy, said)
            return QuantScheme()
        if said.get("weight_quant_granularity") == "per_channel":
            said.setdefault("group_size", None)  # an inherited size would contradict it
        if "activation_dtype" in said and said["activation_dtype"] is None:
            said.setdefault("act_quant_granularity", "per_token")
        try:
            return replace(self, **said, layer_policies=())
        except QuantError as error:
            raise QuantError(f"`quant.layer_policies`, {policy!r}: {error}") from error


_KV_LABELS = {"per_token": "c8", "per_channel": "c8 static"}
_KV_SCALE_BYTES = 4
_TUPLES = ("modules_to_not_convert", "layer_policies")


def _tuple(values: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    value = values[key] if values[key] is not None else ()
    if not isinstance(value, list | tuple):
        raise QuantError(f"`quant.{key}` must be a list, but is {value!r}; write [{value}].")
    return tuple(value)
