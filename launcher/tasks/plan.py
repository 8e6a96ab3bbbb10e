"""plan: what each rank will hold, which sizes work, and how fast a decode can be at most.

Reads config.json and the index only: no process is started and no weight is read.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.environment.size import decide_size
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import ConfigError
from launcher.host.bandwidth import measure_bandwidth_gb_s
from launcher.host.device import check_names
from launcher.resolve import DEMO, DEMO_TP, check_generation, model_overrides
from launcher.schema import Config
from launcher.table import print_table
from parallel.checkpoint.layout import Layout, StoredTensor, make_layout
from parallel.checkpoint.open import describe_layout
from parallel.checkpoint.plan import RankPlan, Workload, plan_rank, unsupported_reason
from parallel.checkpoint.readers.mindformers_files import weights_directory
from parallel.checkpoint.readers.prepared import PreparedSource, is_prepared
from parallel.model.config import ModelConfig
from parallel.model.placements import Row
from parallel.placement import SplitKVHeads, index_shape

_DEFAULT_LENGTH = 4096
_MOST_SIZES = 16
_LAYER = re.compile(r"\.(\d+)\.")


def run(config: Config, environment: WorkerEnvironment) -> None:
    """Print the plan as tables, or as JSON with `plan.json=true`.

    Raises:
        ModelError: `parallel.tp` cannot split this model.
    """
    check_names(config.device, config.dtype)
    check_generation(config.generation)
    layout = _layout(config)
    default = DEMO_TP if config.checkpoint is None and not model_overrides(config) else 1
    size, notes = decide_size(environment, config.parallel.tp, _prepared_size(config), default)
    for note in notes:
        print(f"shardrun: {note}", file=sys.stderr)
    workload = _workload(config, layout.config)
    chosen = plan_rank(layout, size, workload)
    bandwidth = config.plan.bandwidth_gb_s or measure_bandwidth_gb_s()
    sizes = sorted({*_sizes(config, layout), size})
    if config.plan.json:
        print(json.dumps(_to_json(layout, sizes, workload, bandwidth, config), indent=1))
        return
    _print_model(layout, workload)
    _print_placements(layout, chosen.tp)
    _print_sizes(layout, sizes, workload, bandwidth, config)


def _prepared_size(config: Config) -> int | None:
    if config.checkpoint is None or not is_prepared(Path(config.checkpoint)):
        return None
    return PreparedSource(Path(config.checkpoint).absolute()).size


def _layout(config: Config) -> Layout:
    scheme, overrides = config.quant.scheme(), model_overrides(config)
    vocab_emb_dp = config.parallel.vocab_emb_dp
    if config.checkpoint is None and overrides:
        shape = ModelConfig.from_hf(overrides, "`model`")
        return make_layout(shape, scheme, vocab_emb_dp=vocab_emb_dp)
    path = weights_directory(Path(config.checkpoint).absolute()) if config.checkpoint else DEMO
    return describe_layout(path, scheme, overrides, vocab_emb_dp=vocab_emb_dp)


def _workload(config: Config, model: ModelConfig) -> Workload:
    context = model.max_position_embeddings
    length = config.plan.max_length or min(context, _DEFAULT_LENGTH)
    if length > context:
        raise ConfigError(
            f"`plan.max_length` must be 1 to {context} (the context), but is {length}."
        )
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    return Workload(config.plan.batch_size, length, config.generation.prefill_chunk, dtype)


def _sizes(config: Config, layout: Layout) -> list[int]:
    if config.plan.tp is None:
        return [tp for tp in layout.valid_tp_sizes() if tp <= _MOST_SIZES]
    return config.plan.tp


def _print_model(layout: Layout, workload: Workload) -> None:
    config = layout.config
    total = layout.rank_bytes(0, 1)
    print(
        f"{config.architecture}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads / {config.num_key_value_heads} kv heads, "
        f"FFN {config.intermediate_size}, vocab {config.vocab_size}, {config.dtype}\n"
        f"scheme {layout.scheme.label}: {_gb(total)} GB on disk; "
        f"KV cache for {workload.batch_size} x {workload.max_length} tokens\n"
    )


def _print_placements(layout: Layout, tp: int) -> None:
    table: list[tuple[str, ...]] = [
        ("tensor", "shape", "dtype", "placement", f"rank 0 of {tp}", "MB a rank")
    ]
    for name, rows in _patterns(layout):
        first = rows[0][0].row
        table.append(
            (
                name,
                _shape(first.shape),
                " + ".join(_dtype(layout, tensor) for tensor in rows[0]),
                _placement(first, layout.config, tp),
                _shape(index_shape(first.index(0, tp))),
                f"{_largest_bytes(rows, tp) / 1e6:,.1f}",
            )
        )
    print_table(table)


def _dtype(layout: Layout, tensor: StoredTensor) -> str:
    """A weight's own: the bytes that hold two values of int4 are not what its shape counts."""
    is_weight = tensor.name in layout.schemes
    return layout.schemes[tensor.name].weight_dtype if is_weight else tensor.dtype


def _largest_bytes(rows: list[list[StoredTensor]], tp: int) -> int:
    """Bytes of the fullest rank; a weight's scales count with it."""
    tensors = [tensor for parts in rows for tensor in parts]
    return max(sum(tensor.num_bytes(rank, tp) for tensor in tensors) for rank in range(tp))


def _placement(row: Row, config: ModelConfig, tp: int) -> str:
    """The row's placement; kv heads that are replicated say how often."""
    copies = tp // config.num_key_value_heads
    is_copied = isinstance(row.placement, SplitKVHeads) and copies > 1
    return f"{row.placement}, each on {copies} ranks" if is_copied else str(row.placement)


def _print_sizes(
    layout: Layout, sizes: list[int], workload: Workload, bandwidth: float, config: Config
) -> None:
    measured = "given" if config.plan.bandwidth_gb_s else "measured here, all cores"
    rows: list[tuple[str, ...]] = [
        (
            "tp",
            "GB a rank: weights",
            "KV cache",
            "temporaries",
            "total",
            "GB on disk",
            "decode tok/s at most",
        )
    ]
    reasons = []
    for tp in sizes:
        reason = unsupported_reason(layout, tp)
        if reason:
            reasons.append(f"tp={tp} does not work: {reason}")
            continue
        plan = plan_rank(layout, tp, workload)
        speed = f"{_speed(plan, bandwidth, workload, config):,.1f}"
        disk = sum(layout.rank_bytes(rank, tp) for rank in range(tp))
        rows.append((str(tp), *map(_gb, (*_columns(plan), disk)), speed))
    print()
    print_table(rows)
    print(f"\ndecode: bytes read a token over {bandwidth:.1f} GB/s ({measured}); no communication")
    print("\n".join([*reasons, f"valid tp sizes: {_join(layout.valid_tp_sizes())}"]))


def _columns(plan: RankPlan) -> tuple[int, ...]:
    return plan.weight_bytes, plan.kv_cache_bytes, plan.temporary_bytes, plan.total_bytes


def _speed(plan: RankPlan, bandwidth: float, workload: Workload, config: Config) -> float:
    """A bandwidth that is given is one rank's own; the measured one is shared by a host's ranks."""
    share = 1 if config.plan.bandwidth_gb_s else plan.tp
    return plan.tokens_per_s(bandwidth / share, workload.batch_size)


def _to_json(
    layout: Layout, sizes: list[int], workload: Workload, bandwidth: float, config: Config
) -> dict[str, Any]:
    plans: dict[int, dict[str, Any]] = {}
    for tp in sizes:
        reason = unsupported_reason(layout, tp)
        if reason:
            plans[tp] = {"error": reason}
            continue
        plan = plan_rank(layout, tp, workload)
        plans[tp] = {
            **asdict(plan),
            "weight_bytes": plan.weight_bytes,
            "total_bytes": plan.total_bytes,
            "disk_bytes": sum(layout.rank_bytes(rank, tp) for rank in range(tp)),
            "rank_weight_bytes": [
                layout.rank_bytes(rank, tp, workload.dtype) for rank in range(tp)
            ],
            "decode_tokens_per_s": _speed(plan, bandwidth, workload, config),
        }
    return {
        "architecture": layout.config.architecture,
        "scheme": layout.scheme.to_dict(),
        "workload": asdict(workload),
        "bandwidth_gb_s": bandwidth,
        "valid_tp_sizes": list(layout.valid_tp_sizes()),
        "sizes": plans,
    }


def _patterns(layout: Layout) -> list[tuple[str, list[list[StoredTensor]]]]:
    """Rows that differ in their layer only, together: pattern, and the stored parts of each row."""
    parts: dict[str, list[StoredTensor]] = {}
    for tensor in layout.tensors:
        parts.setdefault(tensor.row.name, []).append(tensor)
    groups: dict[tuple[str, Any], list[list[StoredTensor]]] = {}
    for name, tensors in parts.items():
        kinds = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        groups.setdefault((_LAYER.sub(".*.", name), kinds), []).append(tensors)
    return [(name.removeprefix("model."), rows) for (name, _), rows in groups.items()]


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g}" if num_bytes < 1e10 else f"{num_bytes / 1e9:.1f}"


def _join(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))
