"""What was read of a MindFormers file so far, and how its values are checked.

Where the file was given on the command line its faults are the configuration's, and where it lies in
a checkpoint's directory they are the checkpoint's: `ReadFile.error` is the one or the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from parallel.errors import CheckpointError

# Reasons why a key is not used; what a reader may have counted on has another.
TRAINING = "training"
RUNTIME = "how MindSpore runs it"
# What would change the text, and cannot be honoured.
MUST_BE_ABSENT = {
    "pet_config": "merge the adapter into the weights first",
    "quant": "write a quantization_config",
    "quant_config": "write a quantization_config",
    "moe_config": "mixtures of experts are not run; remove it for a dense model",
}


@dataclass
class ReadFile:
    """What was read so far.

    Attributes:
        source: what to call the file.
        error: what is raised of a value that cannot be: a ValueError of one sentence.
        values: our keys.
        unused: theirs that are not used, with their values, by reason.
    """

    source: str
    error: type[ValueError] = CheckpointError
    values: dict[str, Any] = field(default_factory=dict)
    unused: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ignore(self, reason: str, given: Mapping[str, Any]) -> None:
        if given:
            self.unused.setdefault(reason, {}).update(given)

    def use(self, *names: str) -> None:
        """Take back that keys are not used."""
        for given in self.unused.values():
            for name in names:
                given.pop(name, None)

    def report(self) -> tuple[str, ...]:
        """A line for each reason; what a reader may have counted on comes first, with its values."""
        asides = (TRAINING, RUNTIME)
        lines = [
            f"  {why}: {', '.join(given if why in asides else map(_shown, given.items()))}"
            for why, given in sorted(self.unused.items(), key=lambda item: item[0] in asides)
            if given
        ]
        return (f"{self.source} (MindFormers) has keys that are not used:", *lines) if lines else ()

    def refusal(self, key: str, rule: str, value: object, remedy: str) -> ValueError:
        return self.error(f"`{key}` in {self.source} {rule}, but is {value!r}; {remedy}.")

    def mapping(self, key: str, value: Any) -> dict[str, Any]:
        if is_blank(value):
            return {}
        if not isinstance(value, dict):
            raise self.refusal(key, "must be a mapping", value, "correct the indentation below it")
        return value

    def positive(self, key: str, value: Any, kinds: tuple[type, ...] = (int,)) -> Any:
        if type(value) not in kinds or not 0 < value < float("inf"):
            word = "integer" if kinds == (int,) else "number"
            raise self.refusal(key, f"must be a positive {word}", value, "correct it")
        return value

    def check_known(self, section: str, names: Iterable[Any], known: Iterable[str]) -> None:
        """They would swallow an unknown key, and with it what its user wanted."""
        known = sorted(known)
        for name in names:
            if name not in known:
                close = get_close_matches(str(name), known, n=1)
                hint = f"did you mean `{close[0]}`?" if close else "remove it."
                raise self.error(f"`{section}.{name}` in {self.source} is not a key; {hint}")


def check_absent(file: ReadFile, name: str, value: Any) -> None:
    """What would change the text. `moe_config: {expert_num: 1}` is everywhere and does not."""
    key = name.rpartition(".")[2]
    is_dense = key == "moe_config" and file.mapping(name, value).get("expert_num", 1) == 1
    if value != {} and not is_dense:
        raise file.refusal(name, "must be absent", value, MUST_BE_ABSENT[key])
    file.ignore(TRAINING, {name: value})


def _shown(item: tuple[str, Any]) -> str:
    """`batch_size=1`; a mapping or a list by its name alone."""
    name, value = item
    return name if value is None or isinstance(value, dict | list) else f"{name}={value}"


def is_blank(value: Any) -> bool:
    """An unquoted None of theirs is the string "None" to YAML."""
    blank = ("", "none", "null")
    return value is None or (isinstance(value, str) and value.strip().lower() in blank)


def is_true(value: Any) -> bool:
    return str(value).lower() == "true"
