"""What a source must have for a layout: its names, shapes and dtypes, and the scales of calibration."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from parallel.checkpoint.layout import Layout, input_scale_name
from parallel.checkpoint.source import FLOAT_DTYPES, TensorInfo
from parallel.errors import CheckpointError
from parallel.model.families import DROPPED_SUFFIXES
from parallel.model.placements import HEAD, KV_SCALES, Row, Table


def check_calibrated(layout: Layout, tensors: Container[str], where: str) -> None:
    """Raise CheckpointError where the source has no scale of a static input or KV cache."""
    for row in layout.table.values():
        if row.is_kv_scale and row.name not in tensors:
            raise CheckpointError(
                f"{where} has no {row.name}, and quant.kvcache_quant_granularity=per_channel needs "
                "calibration for such static scales; write shardrun prepare with this scheme first "
                "and give its output, or write per_token."
            )
        scheme = layout.schemes.get(row.name)
        if scheme is not None and scheme.is_static and input_scale_name(row) not in tensors:
            raise uncalibrated(row, where)


def uncalibrated(row: Row, where: str) -> CheckpointError:
    """What is wrong with a source without the scale of a static input."""
    return CheckpointError(
        f"{where} has no {input_scale_name(row)}, and quant.act_quant_granularity=per_tensor needs "
        "calibration for such static scales; write shardrun prepare with this scheme first and "
        "give its output, or write per_token."
    )


def check_source(table: Table, tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Compare a float checkpoint with the tensors that the model has.

    Raises:
        CheckpointError: a tensor that is missing, that is not the model's, or not of its shape.
    """
    check_names({row.twin or row.name for row in table.values()}, tensors, where)
    for row in table.values():
        name = row.twin or row.name
        if row.is_kv_scale and name not in tensors:
            continue
        if tensors[name].shape != row.shape:
            raise CheckpointError(
                f"{where}: {name} must have shape {list(row.shape)} by the model's config, but has "
                f"{list(tensors[name].shape)}; use the config.json, or the YAML, of this checkpoint."
            )
        if tensors[name].dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{where}: {name} is {tensors[name].dtype} without a scheme that says its scales; "
                "give the unquantized checkpoint."
            )


def check_names(expected: set[str], names: Iterable[str], where: str) -> None:
    """Compare a checkpoint's names with the model's.

    A tied lm_head may stand in the file as well; as in transformers, the embedding is used. A KV
    cache's static scales may all be missing: calibration makes them (check_calibrated).
    """
    present = {name for name in names if not name.endswith(DROPPED_SUFFIXES)}
    scales = {name for name in expected if name.endswith(KV_SCALES)}
    if present.isdisjoint(scales):
        expected = expected - scales
    missing = sorted(expected - present)
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensors of the model, first {missing[0]}; "
            "download the checkpoint again, or use its own config.json."
        )
    extra = sorted(present - expected - {HEAD})
    if extra:
        raise CheckpointError(
            f"{where} has {len(extra)} tensors that the model does not know, first {extra[0]}; "
            "use the config.json, or the YAML, of this checkpoint."
        )
