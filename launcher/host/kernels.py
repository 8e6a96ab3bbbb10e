"""The kernel of a job: chosen once, from what was measured on this machine, and the same on all ranks.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.failures import ConfigError
from launcher.host.gpus import count_gpus
from launcher.host.kernel_survey import KERNELS, is_plausible, survey
from launcher.host.processor import takes_quads
from launcher.schema import Config
from quant.packing import Packing

AUTO = "auto"
NAMES = (AUTO, *KERNELS)
# Two measurements of the same product differ by as much.
_NOISE = 1.05


def check_kernel(config: Config) -> None:
    """Raises ConfigError for a name that is none of ours."""
    if config.kernel not in NAMES:
        raise ConfigError(f"`kernel` must be one of {', '.join(NAMES)}, but is {config.kernel!r}.")


def choose_kernel(config: Config, labels: Sequence[str]) -> tuple[Config, tuple[str, ...]]:
    """The configuration with its kernel filled in, and what the user should know.

    Args:
        labels: of the schemes that the products have, such as w8a16; without any no kernel is needed.

    Raises:
        ConfigError: the kernel that is asked for does not work here, or would have no effect.
    """
    if not labels:
        _check_unused("kernel", config.kernel, AUTO)
        _check_unused("parallel.exact_sums", config.parallel.exact_sums, None)
        return config, ()
    if config.device == "cuda":
        return _chosen_for_gpus(config), ()
    if config.kernel == "reference":
        return (
            config,
            (),
        )  # works everywhere: what helps where a survey fails must not begin with one
    found = survey()
    if config.device == AUTO and found["computes_on_gpus"] and count_gpus():
        return _chosen_for_gpus(config), ()
    _check_works(config.kernel, found)
    if config.kernel == AUTO:
        config = replace(config, kernel=fastest(found, *labels))
    _check_used(config.kernel, found, labels)
    return config, _notes(config.kernel, found, labels)


def packing_of(config: Config) -> Packing:
    """How the kernel of a job packs weights; where it is not chosen yet (`plan`), as C does it."""
    kernel = config.kernel
    if config.device == "cuda":
        kernel = "reference"
    elif kernel == AUTO:
        kernel = "native"
    return Packing(kernel, takes_quads())


def _check_unused(key: str, value: object, default: object) -> None:
    if value != default:
        raise ConfigError(
            f"`{key}` is {value}, which has no effect on weights that are not quantized; leave it "
            "out, or write quant=rtn_a16w8."
        )


def fastest(found: Mapping[str, Any], *labels: str) -> str:
    """The kernel with the least time for a request of 128 prompt tokens and 128 answered ones.

    A scheme that a kernel has no product for takes the reference path: those with products for the
    most schemes come first.
    """

    def cost(name: str) -> tuple[int, float]:
        own, ms = own_labels(found, name, labels), found["kernels"][name]["ms"]
        return -len(own), sum(127 * ms[label]["1"] + ms[label]["128"] for label in own)

    working = [
        name
        for name in found["kernels"]
        if found["kernels"][name]["problem"] is None and own_labels(found, name, labels)
    ]
    return min(working, key=cost, default="reference")


def own_labels(found: Mapping[str, Any], name: str, labels: Sequence[str]) -> list[str]:
    """The schemes that a kernel, which is not the reference, has products of its own for."""
    return [label for label in labels if label in found["kernels"][name]["ms"]]


def slower_than_bfloat16(found: Mapping[str, Any], name: str, scheme: str) -> list[int]:
    """The numbers of rows at which int8 weights take longer than bfloat16 ones."""
    ms, wide = found["kernels"][name]["ms"].get(scheme, {}), found["unquantized"]["bfloat16"]
    return [int(rows) for rows in ms if ms[rows] > _NOISE * wide[rows]]


_BUSY_NOTE = (
    "the kernels were measured while others had the cores; the next run measures them again"
)


def _chosen_for_gpus(config: Config) -> Config:
    if config.kernel not in (AUTO, "reference"):
        raise ConfigError(
            f"`kernel` is {config.kernel}, which runs on CPUs only; leave it out, or write "
            "device=cpu."
        )
    return replace(config, kernel="reference")


def _check_works(name: str, found: Mapping[str, Any]) -> None:
    reason = None if name == AUTO else found["kernels"][name]["problem"]
    if reason:
        raise ConfigError(
            f"`kernel` is {name}, which does not work here: {reason}; leave it out for the fastest "
            "that does."
        )


def _check_used(name: str, found: Mapping[str, Any], labels: Sequence[str]) -> None:
    if name != "reference" and not own_labels(found, name, labels):
        raise ConfigError(
            f"`kernel` is {name}, which has no product for {', '.join(labels)}; leave it out, or "
            "write kernel=reference."
        )


def _notes(name: str, found: Mapping[str, Any], labels: Sequence[str]) -> tuple[str, ...]:
    """What is slower than its user would expect is said."""
    own = own_labels(found, name, labels)
    others = [label for label in labels if label not in own]
    why = found["kernels"]["native"]["problem"]
    slow = {label: slower_than_bfloat16(found, name, label) for label in own}
    notes = [_slow_note(label, rows) for label, rows in slow.items() if rows]
    if not is_plausible(found):
        notes.append(_BUSY_NOTE)
    return (*notes, *([_reference_note(others, why)] if others else []))


def _slow_note(label: str, rows: Sequence[int]) -> str:
    listed = ", ".join(map(str, rows))
    return f"{label} is slower than bfloat16 weights here for {listed} rows at once"


def _reference_note(labels: Sequence[str], why: str | None) -> str:
    reason = why or "it has none for them"
    return f"{', '.join(labels)} products take the slow reference path (native: {reason})"
