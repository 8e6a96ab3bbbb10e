"""The records of a bench for people."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.table import print_table
from launcher.tasks.bench.record import Record

_HEAD = (
    "phase", "batch", "prompt", "tokens/s", "(least to most)", "ms/step", "GB/s", "of bandwidth",
    "GOP/s", "communication", "waiting", "skew", "peak GB a rank",
)  # fmt: skip
# Of others' work: less than this moves no figure by more than repeats differ.
_DISTURBING_CORES = 0.25


def print_records(records: Sequence[Record]) -> None:
    """What was measured of one size: a title, a line a phase and case, and the ceiling."""
    first = records[0]
    print(f"{_model(first)}\n{_ranks(first)}\n")
    print_table([_HEAD, *map(_row, records)])
    best = max(record["bandwidth_bytes_per_s"] for record in records)
    print(
        f"\nmedians of {first['repeats']} repeats; decode: {first['new_tokens']} tokens after each "
        f"prompt; read bandwidth of all ranks at once, measured between the cases: {best / 1e9:.1f} "
        "GB/s at best",
        flush=True,
    )
    others = max(record["other_cores"] for record in records)
    if others >= _DISTURBING_CORES:
        print(f"other processes kept up to {others:.1f} cores busy: these figures are too low")


def _model(record: Record) -> str:
    kernel = f", kernel {record['kernel']}" if record["kernel"] else ""
    return (
        f"{record['architecture']}: {record['num_hidden_layers']} layers, "
        f"hidden {record['hidden_size']}, {record['weights']}; scheme {record['scheme']}, "
        f"lm_head {record['lm_head']}, computing in {record['dtype']}{kernel}"
    )


def _ranks(record: Record) -> str:
    threads, tp = record["threads"], record["tp"]
    each = (
        f"{threads} thread{'s' if threads > 1 else ''} a rank, loaded in {record['load_s']:.1f} s "
        f"({record['loading']['weight_bytes'] / 1e9 / record['loading']['wall_s']:.2f} GB/s a rank)"
    )
    if not record["estimate"]:
        return f"tp={tp}, {record['device']}, {each}"
    cost = record["collective_cost"]
    return (
        f"ESTIMATE of tp={tp} from rank {record['simulated_rank']} alone, which is measured on "
        f"{record['device']} with {each}; each collective is not done but counted as "
        f"{cost['latency_us']:g} us + bytes on the wire / {cost['gb_s']:g} GB/s (modelled)"
    )


def _row(record: Record) -> tuple[str, ...]:
    least, most = record["tokens_per_s_least"], record["tokens_per_s_most"]
    return (
        record["phase"],
        str(record["batch_size"]),
        str(record["prompt_length"]),
        _figure(record["tokens_per_s"]),
        f"({_figure(least)} to {_figure(most)})",
        f"{record['seconds_median'] / record['steps'] * 1e3:,.2f}",
        f"{record['bytes_per_s'] / 1e9:.1f}",
        f"{record['bandwidth_share']:.0%}",
        f"{record['operations_per_s'] / 1e9:,.0f}",
        f"{record['communication_share']:.1%}",
        f"{record['waiting_share']:.1%}",
        f"{record['skew']:.2f}",
        f"{max(record['peak_bytes']) / 1e9:.2f}",
    )


def _figure(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
