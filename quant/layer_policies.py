"""The entries of `layer_policies`: mappings of a pattern and the fields it changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.errors import QuantError
from quant.scheme_checks import nearest

# What a policy may say of its modules.
POLICY_FIELDS = (
    "weight_dtype", "weight_quant_granularity", "group_size", "activation_dtype",
    "act_quant_granularity",
)  # fmt: skip


def policy_fields(policy: object) -> dict[str, Any]:
    """What a policy says beside its pattern; its values are for the scheme to check.

    Raises:
        QuantError: it has no pattern, an unknown key, or nothing to say.
    """
    if not isinstance(policy, Mapping) or not isinstance(policy.get("pattern"), str):
        raise QuantError(
            "`quant.layer_policies` must be a list of mappings with a pattern, as in "
            f"[{{pattern: '*.down_proj', weight_dtype: int8}}], but holds {policy!r}."
        )
    said = {key: value for key, value in policy.items() if key != "pattern"}
    for key in said:
        if key not in POLICY_FIELDS:
            raise QuantError(
                f"`quant.layer_policies`, {policy['pattern']!r}: {key!r} is no key of a policy; "
                f"{nearest(str(key), POLICY_FIELDS)}"
            )
    if not said:
        raise QuantError(
            f"`quant.layer_policies`, {policy['pattern']!r}: says nothing of its modules; "
            f"give one of {', '.join(POLICY_FIELDS)}, or drop it."
        )
    return said


def check_unquantized(policy: object, said: Mapping[str, Any]) -> None:
    """Raise QuantError where a policy without a weight_dtype says something else too."""
    others = [key for key, value in said.items() if value is not None]
    if others or "weight_dtype" not in said:
        raise QuantError(
            f"`quant.layer_policies`, {policy!r}: {' and '.join(others or said)} has no effect on "
            "modules whose weight_dtype is null; set that too, or leave it out."
        )
