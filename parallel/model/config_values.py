"""The values of a `config.json`, each taken out with one check and one sentence. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallel.errors import ModelError

# Far above any model, and low enough that a damaged number is refused before it is counted up to.
_MOST = {"num_hidden_layers": 4096, "num_attention_heads": 65536}
_MOST_SIZE = 2**31 - 1
# Characters of a damaged value that a message shows.
_LONGEST_VALUE = 200


@dataclass(frozen=True)
class Values:
    """A JSON object of a config.json; a number that is null is as if it were not there.

    Attributes:
        values: the parsed object.
        source: what to call it in an error.
    """

    values: Mapping[str, Any]
    source: str

    def positive(self, key: str, default: int | None = None) -> int:
        return self.integer(key, 1, default)

    def integer(self, key: str, least: int, default: int | None = None) -> int:
        value = self._get(key, default)
        most = _MOST.get(key, _MOST_SIZE)
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"must be an integer of {least} to {most}", value)
        return value

    def number(self, key: str, default: float | None, least: float, most: float) -> float:
        """A number that float32 arithmetic can take."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not least <= value <= most:
            raise self.error(key, f"must be a number of {least:g} to {most:g}", value)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.error(key, "must be true or false", value)
        return value

    def error(self, key: str, rule: str, value: object) -> ModelError:
        shown = repr(value)
        shown = shown if len(shown) <= _LONGEST_VALUE else shown[:_LONGEST_VALUE] + "…"
        return ModelError(f"{self.source}: {key} {rule}, but is {shown}.")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value
