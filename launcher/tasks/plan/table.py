"""A plan for people: what each size holds, what fits, how long it takes, and what does not work."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.table import print_table
from launcher.tasks.plan.machine import Machine
from launcher.tasks.plan.placements import print_placements
from launcher.tasks.plan.report import Report
from launcher.tasks.plan.sizes import SizePlan


def print_report(report: Report) -> None:
    """The tables and the sentences below them, on stdout."""
    _print_model(report)
    print_placements(report.layout, report.tp)
    if report.sizes:
        print()
        _print_memory(report)
        print()
        _print_times(report)
    print()
    for sentence in _sentences(report):
        print(sentence)


def _print_model(report: Report) -> None:
    config, workload = report.layout.config, report.workload
    total = report.layout.rank_bytes(0, 1)
    print(
        f"{config.architecture}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_attention_heads} heads / {config.num_key_value_heads} kv heads, "
        f"FFN {config.intermediate_size}, vocab {config.vocab_size}, {config.dtype}\n"
        f"scheme {report.layout.scheme.label}: {gigabytes(total)} GB on disk, from "
        f"{gigabytes(report.source.num_bytes)} GB of source (by {report.source.basis}); "
        f"KV cache for {workload.batch_size} x {workload.max_length} tokens\n"
    )


def _print_memory(report: Report) -> None:
    length, batch = report.workload.max_length, report.workload.batch_size
    head = (
        "tp", "GB a rank: linears", "embed, head", "others", "KV cache", "temporaries", "total",
        "memory", "fits", f"longest x {batch}", f"most x {length}",
    )  # fmt: skip
    print_table([head, *(_memory_cells(tp, plan) for tp, plan in report.sizes.items())])


def _memory_cells(tp: int, plan: SizePlan) -> tuple[str, ...]:
    rank = plan.rank
    parts = (
        rank.linear_bytes, rank.embedding_bytes, rank.other_bytes, rank.kv_cache_bytes,
        rank.temporary_bytes, rank.total_bytes, plan.memory_bytes,
    )  # fmt: skip
    fits = ("yes" if plan.fits else "no", f"{plan.longest_context:,}", f"{plan.largest_batch:,}")
    return (str(tp), *map(gigabytes, parts), *fits)


def _print_times(report: Report) -> None:
    """A column only where its speed is known."""
    columns = {
        "tp": [str(tp) for tp in report.sizes],
        "GB on disk": [gigabytes(plan.output_bytes) for plan in report.sizes.values()],
        "prepare s": _cells([plan.prepare_s for plan in report.sizes.values()]),
        "load s: disk": _cells([plan.load_disk_s for plan in report.sizes.values()]),
        "load s: memory": _cells([plan.load_memory_s for plan in report.sizes.values()]),
        "decode tok/s": _cells([plan.decode_tokens_per_s for plan in report.sizes.values()]),
        "prefill tok/s": _cells([plan.prefill_tokens_per_s for plan in report.sizes.values()]),
    }
    shown = {name: cells for name, cells in columns.items() if cells}
    print_table([tuple(shown), *zip(*shown.values(), strict=True)])


def _cells(values: Sequence[float | None]) -> list[str]:
    known = [value for value in values if value is not None]
    return [f"{value:,.1f}" if value >= 1 else f"{value:.3g}" for value in known]


def _sentences(report: Report) -> list[str]:
    machine = report.machine
    found = [_bandwidth_sentence(machine), _disk_sentence(machine), _memory_sentence(machine)]
    found += [_output_sentence(report)]
    found += [f"tp={tp} does not work: {text}" for tp, text in report.errors.items()]
    found += [
        f"tp {ranges(sizes)} {'does' if len(sizes) == 1 else 'do'} not work: {reason}"
        for reason, sizes in report.obstacles.items()
    ]
    valid = ", ".join(map(str, report.layout.valid_tp_sizes()))
    return [*filter(None, found), f"valid tp sizes: {valid}"]


def _bandwidth_sentence(machine: Machine) -> str:
    given = machine.rank_bandwidth_gb_s
    speed = f"{given:.1f} GB/s (given)" if given else (
        f"{machine.host_bandwidth_gb_s:.1f} GB/s (measured here, all cores)"
    )  # fmt: skip
    prefill = "; prefill: products alone" if machine.rank_flops else ""
    return f"decode, at most: bytes read a token over {speed}; no communication{prefill}"


def _disk_sentence(machine: Machine) -> str:
    """Where there is neither a file nor a number, there are no times to explain."""
    if machine.read_gb_s is None:
        return "prepare: no time without a file to measure or plan.disk_gb_s"
    how = "given" if machine.disk_is_given else "measured here, one thread"
    written = "and taken to write as fast"
    if machine.write_gb_s is not None:
        written = f"written at {machine.write_gb_s:.2f} GB/s"
    return (
        f"prepare and load: bytes over the disk's speed, read at {machine.read_gb_s:.2f} GB/s, "
        f"{written} ({how}); all ranks on one host"
    )


def _memory_sentence(machine: Machine) -> str:
    if machine.rank_memory_bytes:
        return ""
    total = gigabytes(machine.host_memory_bytes)
    return f"memory: this host's {total} GB, shared by its ranks (plan.memory_gb gives another)"


def _output_sentence(report: Report) -> str:
    free, fits = report.machine.free_bytes, report.output_fits
    if free is None:
        return ""
    needed = report.sizes[report.tp].output_bytes
    room = "has room for it" if fits else "is too small: free some, or choose another `output`"
    return (
        f"output: tp={report.tp} needs {gigabytes(needed)} GB, and its disk, with "
        f"{gigabytes(free)} GB free, {room}"
    )


def ranges(sizes: Sequence[int]) -> str:
    """Numbers in their order as `3, 5-7, 9`."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and size == runs[-1][1] + 1:
            runs[-1][1] = size
        else:
            runs.append([size, size])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g}" if num_bytes < 1e10 else f"{num_bytes / 1e9:,.1f}"
