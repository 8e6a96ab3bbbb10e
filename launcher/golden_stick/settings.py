"""What the flags say of `quant.*` and `calibration.*`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.failures import ConfigError
from launcher.golden_stick.flags import DATASETS, FLAGS, Approach, choose
from launcher.hydra_list import hydra_list


def read_settings(given: Mapping[str, Any], approach: Approach) -> dict[str, str]:
    """The value of every flag of FLAGS, as given, as the approach has it, or Golden Stick's default."""
    settings: dict[str, str] = {}
    for flag in FLAGS:
        value = choose(flag.short, given.get(flag.short, flag.default), flag.values)
        if approach.fixed is not None and flag.needs is None:
            fixed = approach.fixed.get(flag.short, flag.default)
            if flag.short in given and value != fixed:
                raise ConfigError(
                    f"`{flag.short}` must be {fixed} with -q {given['-q']}, but is {value!r}; leave it "
                    "out, or write -q ptq."
                )
            value = fixed
        if flag.needs and settings[flag.needs] == "none" and value != flag.default:
            raise ConfigError(
                f"`{flag.short}` is {value!r}, which has no effect while {flag.needs} is none; "
                f"leave it out, or set {flag.needs}."
            )
        settings[flag.short] = value
    return settings


def quant_fields(settings: Mapping[str, str], approach: Approach) -> dict[str, str]:
    """What the preset leaves open. Granularities always: their defaults are not shardrun's."""
    said = [
        flag
        for flag in FLAGS
        if (approach.fixed is None if flag.needs is None else settings[flag.needs] != "none")
    ]
    values = {f"quant.{flag.field}": settings[flag.short] for flag in said}
    return {key: "null" if value in ("none", "0") else value for key, value in values.items()}


def left_out(modules: list[str], approach: Approach, settings: Mapping[str, str]) -> dict[str, str]:
    """`-b`, whose MindFormers names `quant` translates."""
    if settings["-w"] == "none":
        if modules:
            raise ConfigError(
                f"`-b` is {' '.join(modules)!r}, which has no effect while no weight is quantized "
                "(-w is none); leave it out."
            )
        return {}
    patterns = dict.fromkeys([*approach.left_out, *modules])
    return {"quant.modules_to_not_convert": hydra_list(patterns)}


def data_words(given: Mapping[str, Any], approach: Approach) -> dict[str, str]:
    """`-s`, if it is what -t says it is; neither where nothing is calibrated."""
    path, kind = given.get("-s"), given.get("-t")
    if not approach.calibrates:
        return {}
    is_jsonl = None if kind is None else DATASETS[choose("-t", kind, DATASETS)]
    if path is None:
        if kind is not None:
            raise ConfigError(f"`-t` is {kind}, but there is no -s; give the file, or drop -t.")
        return {}
    if is_jsonl is not None and is_jsonl != path.endswith(".jsonl"):
        rule = "end in .jsonl" if is_jsonl else "be plain text, not .jsonl"
        raise ConfigError(f"`-s` must {rule} with -t {kind}, but is {path!r}; correct one of them.")
    return {"calibration.data": path}


def data_notes(given: Mapping[str, Any], approach: Approach) -> list[str]:
    """The guide's line gives data to an approach that reads none, as Golden Stick does not."""
    unused = [short for short in ("-s", "-t") if short in given]
    if approach.calibrates or not unused:
        return []
    return [
        f"not used: {' '.join(unused)} (-q {given['-q']} is not calibrated, in Golden Stick neither)"
    ]
