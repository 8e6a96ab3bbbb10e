"""plan: what each rank will hold, which sizes work, what fits, and how fast it can be at most.

Reads config.json and the index, and of weights no more than `describe_layout` says; starts no process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from launcher.environment.size import decide_size
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import ConfigError
from launcher.host.device import check_names
from launcher.host.kernels import check_kernel, packing_of
from launcher.resolve import DEMO_TP, check_generation, checkpoint_path, is_shape_alone
from launcher.schema import Config, model_overrides
from launcher.tasks.plan.machine import Machine, describe_machine
from launcher.tasks.plan.report import Report
from launcher.tasks.plan.sizes import plan_size
from launcher.tasks.plan.table import print_report
from parallel.checkpoint.layout import Layout, make_layout
from parallel.checkpoint.open import describe_layout, own_size
from parallel.checkpoint.plan import Workload, unsupported_reason
from parallel.checkpoint.plan_disk import SourceSize, source_size
from parallel.checkpoint.plan_fit import obstacles
from parallel.model.config import ModelConfig

_DEFAULT_LENGTH = 4096


def run(config: Config, environment: WorkerEnvironment) -> None:
    """Print the plan as tables, or as JSON with `plan.json=true`; draw it with `plan.picture=FILE`.

    Raises:
        ModelError: `parallel.tp` cannot split this model.
    """
    check_names(config.device, config.dtype)
    check_kernel(config)
    check_generation(config.generation)
    picture = _picture(config.plan.picture)
    layout, path = _layout(config), _path(config)
    tp = _decide_tp(config, environment)
    layout.check_tp(tp)
    workload = _workload(config, layout.config)
    source = source_size(path, layout)
    machine = describe_machine(config, source.largest)
    report = _make_report(config, layout, tp, workload, machine, source)
    if config.plan.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print_report(report)
    if picture is not None:
        _draw(report, picture)


def _decide_tp(config: Config, environment: WorkerEnvironment) -> int:
    default = DEMO_TP if config.checkpoint is None and not model_overrides(config) else 1
    own = own_size(checkpoint_path(config)) if config.checkpoint else None
    size, notes = decide_size(environment, config.parallel.tp, own, default)
    for note in notes:
        _say(note)
    return size


def _say(note: str) -> None:
    print(f"shardrun: {note}", file=sys.stderr)


def _path(config: Config) -> Path | None:
    """The directory of the source, where a shape is not all there is."""
    return None if is_shape_alone(config) else checkpoint_path(config)


def _layout(config: Config) -> Layout:
    scheme, overrides = config.quant.scheme(), model_overrides(config)
    vocab_emb_dp, path = config.parallel.vocab_emb_dp, _path(config)
    if path is None:
        shape = ModelConfig.from_hf(overrides, "`model`")
        return make_layout(shape, scheme, vocab_emb_dp=vocab_emb_dp)
    return describe_layout(path, scheme, overrides, vocab_emb_dp=vocab_emb_dp, on_note=_say)


def _workload(config: Config, model: ModelConfig) -> Workload:
    context = model.max_position_embeddings
    length = config.plan.max_length or min(context, _DEFAULT_LENGTH)
    if length > context:
        raise ConfigError(
            f"`plan.max_length` must be 1 to {context} (the context), but is {length}."
        )
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    batch_size, chunk = config.plan.batch_size, config.generation.prefill_chunk
    return Workload(batch_size, length, chunk, dtype, packing_of(config))


def _make_report(
    config: Config,
    layout: Layout,
    tp: int,
    workload: Workload,
    machine: Machine,
    source: SourceSize,
) -> Report:
    asked = config.plan.tp
    most = config.plan.max_tp
    valid = [size for size in layout.valid_tp_sizes() if size <= most]
    wanted = sorted({*(valid if asked is None else asked), tp})
    errors = {size: text for size in wanted if (text := unsupported_reason(layout, size))}
    path = _path(config)
    return Report(
        layout=layout,
        workload=workload,
        machine=machine,
        source=source,
        tp=tp,
        sizes={
            size: plan_size(layout, size, workload, machine, source, path)
            for size in wanted
            if size not in errors
        },
        errors=errors,
        obstacles=obstacles(layout, range(1, most + 1)) if asked is None else {},
    )


def _picture(name: str | None) -> Path | None:
    """Where to draw; a file that exists is nobody's to replace."""
    if name is None:
        return None
    path = Path(name).absolute()
    if os.path.lexists(path) or not path.parent.is_dir():
        raise ConfigError(
            f"`plan.picture` must be a new file in a directory that exists, but is {path}; choose "
            "another."
        )
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(
            f"`plan.picture` must end in .png, .svg or .pdf, but is {path}; rename it."
        )
    return path


def _draw(report: Report, path: Path) -> None:
    """JSON on stdout stays JSON."""
    from launcher.tasks.plan.plot import draw_memory

    print(draw_memory(report, path), file=sys.stderr)
