"""Golden Stick's flags and approaches as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from launcher.failures import ConfigError


@dataclass(frozen=True)
class Flag:
    """A flag of theirs that sets a field of `quant`.

    Attributes:
        values: what it may say; the first is Golden Stick's default.
        needs: the flag without which it has no effect.
    """

    short: str
    long: str
    field: str
    values: tuple[str, ...]
    needs: str | None = None

    @property
    def default(self) -> str:
        return self.values[0]


@dataclass(frozen=True)
class Approach:
    """A value of -q.

    Attributes:
        fixed: what the preset says of -w -a -k -o -p, where it is not none; None: they say it.
        left_out: the modules it leaves alone. PTQ walks decoder layers, and lm_head is in none.
        calibrates: whether it reads data.
    """

    preset: str
    fixed: Mapping[str, str] | None
    left_out: tuple[str, ...]
    calibrates: bool = True


FLAGS = (
    Flag("-w", "weight_quant_dtype", "weight_dtype", ("none", "int8", "int4")),
    Flag("-a", "act_quant_dtype", "activation_dtype", ("none", "int8")),
    Flag("-k", "kvcache_quant_dtype", "kvcache_dtype", ("none", "int8")),
    Flag("-o", "outliers_suppression", "outliers_suppression", ("none", "smooth", "awq")),
    Flag("-p", "precision_recovery", "precision_recovery", ("none", "gptq")),
    Flag(
        "-ag", "act_quant_granularity", "act_quant_granularity", ("per_tensor", "per_token"), "-a"
    ),
    Flag(
        "-wg",
        "weight_quant_granularity",
        "weight_quant_granularity",
        ("per_channel", "per_group"),
        "-w",
    ),
    Flag(
        "-kvg",
        "kvcache_quant_granularity",
        "kvcache_quant_granularity",
        ("per_channel", "per_token"),
        "-k",
    ),
    Flag("-g", "group_size", "group_size", ("0", "32", "64", "128"), "-w"),
)
APPROACHES = {
    "rtn-a16w8": Approach("rtn_a16w8", {"-w": "int8"}, ("lm_head",), calibrates=False),
    "rtn-c8": Approach("rtn_c8", {"-k": "int8"}, ()),
    "smooth_quant": Approach(
        "smooth_quant", {"-w": "int8", "-a": "int8", "-o": "smooth"}, ("lm_head", "w2")
    ),
    "ptq": Approach("ptq", None, ("lm_head",)),
}
# Of each kind of data, whether it is JSONL: prepare tells JSONL from text by the file's name, and
# finds BoolQ's question and passage by itself.
DATASETS = {"boolq": True, "jsonl": True, "wikitext2": False, "text": False}
# Flags that prepare has nothing for, and the one value that asks for nothing.
WITHOUT_COUNTERPART = {"-e": ("debug_mode", "false"), "-d": ("dump_path", "")}
# The keys that their other flags set.
KEYS = {
    "-q": "quant", "-s": "calibration.data", "-b": "quant.modules_to_not_convert",
    **{flag.short: f"quant.{flag.field}" for flag in FLAGS},
}  # fmt: skip


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def choose(short: str, value: str, known: Iterable[str]) -> str:
    """The one of `known`, all of small letters, that a value is in any case."""
    if value.lower() in (known := list(known)):
        return value.lower()
    close = get_close_matches(value.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else "write one of them."
    raise ConfigError(f"`{short}` must be one of {listed(known)}, but is {value!r}; {hint}")
