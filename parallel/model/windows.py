"""Sliding windows: how many positions each layer's queries see, from `config.json`. Needs no torch.

A query sees its own position and the `sliding_window - 1` before it, as in transformers.
"""

from __future__ import annotations

from parallel.model.config_values import Values
from parallel.model.families import Window

_FULL, _SLIDING = "full_attention", "sliding_attention"
# By layer: positions that a query sees, its own included; None: all.
Windows = tuple[int | None, ...]


def positions_seen(windows: Windows, start: int, stop: int) -> int:
    """Positions that the queries from `start` to `stop` of a sequence see, of all layers together.

    A query at position p sees p + 1 in a layer without a window. It is what a decode of those queries
    reads of the cache, and what its products of attention are counted by; of a prefill the latter.
    """
    return sum(_seen_before(stop, window) - _seen_before(start, window) for window in windows)


def _seen_before(position: int, window: int | None) -> int:
    """By all queries before a position: one more each, until the window is full."""
    growing = position if window is None else min(position, window)
    return growing * (growing + 1) // 2 + (position - growing) * growing


def layer_windows(config: Values, kind: Window) -> Windows:
    """Raises: ModelError: keys that the architecture passes over, or that contradict each other."""
    num_layers = config.positive("num_hidden_layers")
    given = config.values.get("sliding_window")
    size = None if given is None else config.positive("sliding_window")
    if kind is Window.BY_LAYER:
        return _by_layer(config, size, num_layers)
    if kind is Window.NONE:
        _refuse_window(config, size)
        size = None
    _refuse_mixture(config, _FULL if size is None else _SLIDING, num_layers)
    return (size,) * num_layers


def _by_layer(config: Values, size: int | None, num_layers: int) -> Windows:
    if not config.boolean("use_sliding_window", False):
        size = None
    kinds = config.values.get("layer_types")
    if kinds is None:
        first = 0 if size is None else config.integer("max_window_layers", 0)
        return tuple(None if layer < first else size for layer in range(num_layers))
    _check_kinds(config, kinds, num_layers)
    if size is None and _SLIDING in kinds:
        rule = f"must have no {_SLIDING} without use_sliding_window and sliding_window"
        raise config.error("layer_types", rule, kinds)
    return tuple(size if kind == _SLIDING else None for kind in kinds)


def _check_kinds(config: Values, kinds: object, num_layers: int) -> None:
    is_list = isinstance(kinds, list) and len(kinds) == num_layers
    if not is_list or any(kind not in (_FULL, _SLIDING) for kind in kinds):  # type: ignore[attr-defined]
        rule = f"must be a list of {num_layers}, each {_FULL} or {_SLIDING}"
        raise config.error("layer_types", rule, kinds)


def _refuse_window(config: Values, size: int | None) -> None:
    """transformers passes it over in Llama; one as long as the context says nothing."""
    context = config.positive("max_position_embeddings", 2048)
    if size is not None and size < context:
        rule = f"must be null or at least {context} in this architecture"
        raise config.error("sliding_window", rule, size)


def _refuse_mixture(config: Values, kind: str, num_layers: int) -> None:
    """transformers passes layer_types over where an architecture's layers are alike."""
    kinds = config.values.get("layer_types")
    if kinds is not None and kinds != [kind] * num_layers:
        raise config.error("layer_types", f"must be {kind} for each layer", kinds)
