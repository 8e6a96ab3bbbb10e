"""Where the milliseconds of a step go, as a table in Markdown: decode of one token, and prefill.

    python scripts/profile_step.py --model llama2_13b --layers 8 --dtype bfloat16 --scheme w8a16

Random weights of a shape in conf/model/, one process. Every part of the step is stamped, and each
row has the time that is its own, without the parts inside it; so the rows add up to the whole. The
same steps are run without stamps in between: what the stamps cost is the row "stamps, noise".

    python scripts/profile_step.py --layers 4 --batch 8 --prompt 4096 --filled --cache compute int8

writes random keys and values into the cache in place of the prefill, and compares the caches, whose
steps are run in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import parallel.generation.decode as decode
import parallel.layers as layers
import parallel.model.decoder as model
from launcher.host.bandwidth import measure_bandwidth_gb_s
from parallel.checkpoint.open import open_random
from parallel.generation.cache import KVCache
from parallel.generation.sampling import Sampling, prompt_generator
from parallel.group import Group, LoneGroup, SimulatedGroup
from parallel.load import LoadTimings, load_decoder
from parallel.model.captured import CapturedLayers
from parallel.model.windows import positions_seen
from quant.kernels.choice import KERNELS, open_kernel
from quant.kernels.native.recording import Program
from quant.kernels.native.weight import NativeWeight
from quant.scheme import QuantScheme
from quant.weight import ReadyWeight

RUN = Program.run
# What a step's recorded calls are, but for its products; by the names of their structs.
RECORDED = {
    "attend": "attention",
    "write_slots": "cache write",
    "write_int8": "cache write",
    "rms_norm": "residual sums, norms",
    "silu_product": "silu(gate) * up",
    "rotate": "rotary",
    "row_amax": "amax of rows",
    "finish": "scaling of sums",
}
CONF = Path(__file__).parents[1] / "conf" / "model"
SCHEMES = {
    "none": QuantScheme(),
    "w8a16": QuantScheme(quant_method="rtn", weight_dtype="int8"),
    "w8a8": QuantScheme(quant_method="rtn", weight_dtype="int8", activation_dtype="int8"),
    **{
        name: QuantScheme(
            quant_method="rtn",
            weight_dtype="int4",
            activation_dtype="int8" if name.startswith("w4a8") else None,
            weight_quant_granularity="per_group" if size else "per_channel",
            group_size=size,
        )
        for name, size in {
            "w4a16": None,
            "w4a8": None,
            "w4a16-g32": 32,
            "w4a16-g128": 128,
            "w4a8-g128": 128,
        }.items()
    },
}
# The KV cache's dtype: that of the compute, or int8 with a scale for each token and head.
CACHES = {"compute": QuantScheme(), "int8": QuantScheme(quant_method="rtn", kvcache_dtype="int8")}
Watches = tuple["Stopwatch", "Stopwatch"]


@dataclass
class Stopwatch:
    """Self time of nested calls, step by step.

    Attributes:
        steps: for each phase, what each of its steps took: kind -> seconds inside it and in none
            of the kinds inside it.
    """

    steps: dict[str, list[Counter[str]]] = field(default_factory=lambda: defaultdict(list))
    _self_s: Counter[str] = field(default_factory=Counter)
    _inside: list[float] = field(default_factory=list)

    def timed(self, kind: str | Callable[..., str], function: Callable[..., Any]) -> Any:
        """`function` with stamps; `kind` may depend on its arguments."""

        @functools.wraps(function)
        def stamped(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                spent = time.perf_counter() - start
                name = kind if isinstance(kind, str) else kind(*arguments, **named)
                self._self_s[name] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        return stamped

    def recorded(self, kind: Callable[[Any], str]) -> Any:
        """Program.run with stamps between its calls; `kind` may depend on a call's arguments."""

        def run(program: Program) -> None:
            seconds = (ctypes.c_double * len(program.calls))()
            RUN(program, seconds)
            for arguments, spent in zip(program.arguments, seconds, strict=True):
                self._self_s[kind(arguments)] += spent
                self._inside[-1] += spent

        return run

    def phased(self, phase: str, generator: Callable[..., Iterator[Any]]) -> Any:
        """An outermost generator, one step a call: its work is done while it is read, here at once."""
        drain = self.timed("generation loop", list)

        def entered(*arguments: Any) -> Iterator[Any]:
            self._self_s = Counter()
            ended = drain(generator(*arguments))
            self.steps[phase].append(self._self_s)
            return iter(ended)

        return entered

    def rows(self, phase: str, read_bytes: Mapping[str, int]) -> list[Row]:
        """The median step's kinds, the longest first."""
        steps = self.steps[phase]
        rows = [
            Row(
                kind,
                statistics.median(step[kind] for step in steps),
                read_bytes.get(kind, 0),
            )
            for kind in steps[0]
        ]
        return sorted(rows, key=lambda row: -row.seconds)

    def median_s(self, phase: str) -> float:
        return statistics.median(step.total() for step in self.steps[phase])


@dataclass(frozen=True)
class Row:
    """One kind of work in a step of a phase.

    Attributes:
        num_bytes: weights, or keys and values, that it must read a step; 0 where that is nothing.
    """

    kind: str
    seconds: float
    num_bytes: int = 0


def products(decoder: model.Decoder) -> Iterator[tuple[str, ReadyWeight]]:
    """Every product of a step and its weight."""
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield "qkv product", attention.qkv_proj.linear.local_weight
        yield "o_proj product", attention.o_proj.local_weight
        yield "gate-up product", mlp.gate_up_proj.linear.local_weight
        yield "down product", mlp.down_proj.local_weight
    yield "lm_head product", decoder.lm_head.local_weight


def weight_address(weight: ReadyWeight) -> int:
    """Of the bytes that a product reads."""
    data = weight.packed if isinstance(weight, NativeWeight) else weight
    return data.data_ptr() if isinstance(data, torch.Tensor) else id(weight)


@contextmanager
def stamps(watch: Stopwatch, decoder: model.Decoder, *, parts: bool) -> Iterator[None]:
    """Stamp the steps, and their parts if asked, for as long as the context lasts."""
    kinds = {id(weight): name for name, weight in products(decoder)}

    def product(_x: object, weight: ReadyWeight, *_rest: object, **_named: object) -> str:
        return kinds[id(weight)]

    def row_product(layer: layers.RowParallelLinear, _x: object) -> str:
        """Its bias, its rounding, and exact sums, which do not pass through `linear`."""
        return kinds[id(layer.local_weight)]

    places = {weight_address(weight): name for name, weight in products(decoder)}

    def recorded(arguments: Any) -> str:
        name = type(arguments).__name__
        if name in RECORDED:
            return RECORDED[name]
        return places.get(arguments.w if name == "bfloat16" else arguments.packed, name)

    group = type(decoder.group)
    targets: list[tuple[Any, str, str | Callable[..., str]]] = [
        (layers, "linear", product),
        (CapturedLayers, "__call__", "program"),
        (model, "rotate", "rotary"),
        (KVCache, "write", "cache write"),
        (model.Attention, "decode", "attention"),
        (model.Attention, "prefill", "attention"),
        (model.Attention, "__call__", "views of q, k, v"),
        (model.MLP, "__call__", "silu(gate) * up"),
        (model.RMSNorm, "__call__", "residual sums, norms"),
        (model.DecoderLayer, "__call__", "calls of a layer"),
        (layers.VocabParallelEmbedding, "__call__", "embedding"),
        (layers.VocabParallelHead, "__call__", "logits to float32"),
        (layers.RowParallelLinear, "__call__", row_product),
        (layers.ColumnParallelLinears, "__call__", "views of q, k, v"),
        (group, "all_reduce", "all-reduce"),
        (group, "gather", "gather of logits"),
        (group, "broadcast", "broadcast of tokens"),
        (model.Decoder, "__call__", "masks, angles, selection"),
        (decode, "next_token", "sampling"),
        (decode.GenerationLoop, "_decode_step", "tensors of the step"),
        (decode.GenerationLoop, "_prefill_step", "tensors of the step"),
    ]
    targets = targets if parts else []
    phases = [("_admit", "prefill"), ("_decode", "decode")]
    undo = [(owner, name, getattr(owner, name)) for owner, name, _ in targets]
    undo += [
        (decode.GenerationLoop, name, getattr(decode.GenerationLoop, name)) for name, _ in phases
    ]
    for owner, name, kind in targets:
        setattr(owner, name, watch.timed(kind, getattr(owner, name)))
    if parts:
        undo.append((Program, "run", RUN))
        Program.run = watch.recorded(recorded)  # type: ignore[method-assign]
    for name, phase in phases:
        whole = getattr(decode.GenerationLoop, name)
        setattr(decode.GenerationLoop, name, watch.phased(phase, whole))
    try:
        yield
    finally:
        for owner, name, function in undo:
            setattr(owner, name, function)


@dataclass(frozen=True)
class Run:
    """What was asked for."""

    model: str
    layers: int
    dtype: str
    scheme: str
    kernel: str
    tp: int
    threads: int
    prompt: int
    tokens: int
    batch: int
    repeats: int
    cache: list[str]
    filled: bool


def parse() -> Run:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="llama2_13b", help="a shape of conf/model/")
    add("--layers", type=int, default=8)
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    add("--scheme", default="w8a16", choices=sorted(SCHEMES))
    add("--kernel", default="native", choices=sorted(KERNELS))
    add("--tp", type=int, default=1, help="above 1: one rank of so many, without the others")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--prompt", type=int, default=128, help="tokens of each prompt")
    add("--tokens", type=int, default=8, help="tokens to decode")
    add("--batch", type=int, default=1, help="sequences")
    add("--repeats", type=int, default=3)
    add(
        "--cache",
        nargs="+",
        default=["compute"],
        choices=sorted(CACHES),
        help="dtype of the KV cache",
    )
    add("--filled", action="store_true", help="random keys and values in place of the prefill")
    return Run(**vars(parser.parse_args()))


def open_model(run: Run) -> tuple[model.Decoder, LoadTimings]:
    values = yaml.safe_load((CONF / f"{run.model}.yaml").read_text())
    values |= {"num_hidden_layers": run.layers, "torch_dtype": run.dtype}
    scheme = SCHEMES[run.scheme]
    checkpoint = open_random(values, scheme, seed=0)
    group: Group = LoneGroup() if run.tp == 1 else SimulatedGroup(0, run.tp)
    return load_decoder(
        checkpoint.layout(scheme),
        checkpoint.source,
        group,
        getattr(torch, run.dtype),
        torch.device("cpu"),
        max_length=run.prompt + run.tokens,
        kernel=open_kernel(run.kernel),
        num_threads=run.threads,
    )


class FilledLoop(decode.GenerationLoop):
    """Its cache holds the prompts already."""

    def _admit(self, waiting: deque[decode.Request]) -> Iterator[decode.Completion]:
        while waiting:
            request = waiting.popleft()
            generator = prompt_generator(0, request.index)
            self._running.append(decode._Sequence(request, generator, [request.prompt_ids[-1]]))
        return iter(())


def open_cache(run: Run, decoder: model.Decoder, kind: str) -> KVCache:
    decoder.kv_granularity = CACHES[kind].kv_granularity
    cache = decoder.new_cache(run.batch, run.prompt + run.tokens)
    if run.filled:
        fill(run, decoder, cache)
    return cache


def fill(run: Run, decoder: model.Decoder, cache: KVCache) -> None:
    """The same random keys and values in every row and layer, which a step cannot know."""
    shape = (run.prompt, decoder.num_local_kv_heads, decoder.config.head_dim)
    random = torch.Generator().manual_seed(0)
    k_THC, v_THC = (torch.randn(shape, generator=random).to(decoder.dtype) for _ in "kv")
    for row in range(run.batch):
        slots_T = torch.arange(run.prompt) + row * cache.max_length
        for layer in range(run.layers):
            cache.write(layer, slots_T, k_THC, v_THC)


def generate(run: Run, decoder: model.Decoder, cache: KVCache) -> None:
    """Prefill, unless the cache is filled, and decode once, greedily."""
    kind = FilledLoop if run.filled else decode.GenerationLoop
    loop = kind(decoder, cache, Sampling(), prefill_chunk=run.batch * run.prompt)
    ids = [tuple(range(3 + index, 3 + index + run.prompt)) for index in range(run.batch)]
    requests = [decode.Request(index, prompt, run.tokens) for index, prompt in enumerate(ids)]
    for _ in loop.run(requests):
        pass


def measure(run: Run, decoder: model.Decoder) -> dict[str, Watches]:
    """With stamps on the parts and without, and over each cache, in turn; the first is not counted."""
    caches = {kind: open_cache(run, decoder, kind) for kind in run.cache}
    watches = {kind: (Stopwatch(), Stopwatch()) for kind in caches}
    for repeat in range(run.repeats + 1):
        for kind, cache in caches.items():
            for watch, parts in zip(watches[kind], (True, False), strict=True):
                with stamps(watch if repeat else Stopwatch(), decoder, parts=parts):
                    generate(run, decoder, cache)
    return watches


def print_table(title: str, rows: list[Row]) -> None:
    total = sum(row.seconds for row in rows)
    print(f"\n### {title}: {1000 * total:.1f} ms\n")
    print("| what | ms | share | reads | GB/s |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        share = f"{100 * row.seconds / total:.1f} %"
        reads = f"{row.num_bytes / 1e6:.0f} MB" if row.num_bytes else ""
        rate = f"{row.num_bytes / row.seconds / 1e9:.1f}" if row.num_bytes else ""
        print(f"| {row.kind} | {1000 * row.seconds:.2f} | {share} | {reads} | {rate} |")


def step_bytes(run: Run, decoder: model.Decoder, kind: str) -> Counter[str]:
    """Bytes of weights, and of the mean step's keys and values, that a step must read."""
    found: Counter[str] = Counter()
    for name, weight in products(decoder):
        found[name] += weight.nbytes
    entry = CACHES[kind].kv_bytes(decoder.config.head_dim, decoder.dtype.itemsize)
    seen = positions_seen(decoder.config.windows, run.prompt, run.prompt + run.tokens) / run.tokens
    found["attention"] = int(run.batch * seen * 2 * decoder.num_local_kv_heads * entry)
    return found


def print_phase(title: str, phase: str, watches: Watches, read_bytes: Mapping[str, int]) -> None:
    stamped, plain = watches
    rows = stamped.rows(phase, read_bytes)
    rest = plain.median_s(phase) - sum(row.seconds for row in rows)
    print_table(title, [*rows, Row("stamps, noise", rest)])


def main() -> None:
    run = parse()
    torch.set_num_threads(run.threads)
    decoder, loaded = open_model(run)
    found = measure(run, decoder)
    bandwidth = measure_bandwidth_gb_s()
    print(f"Measured with `python scripts/profile_step.py {arguments(run)}`")
    print(
        f"and torch {torch.__version__}; medians of steps, weights {loaded.weight_bytes / 1e9:.2f} GB."
    )
    for kind, watches in found.items():
        print_cache(run, kind, watches, step_bytes(run, decoder, kind), bandwidth)
    first, *others = ((kind, plain.median_s("decode")) for kind, (_, plain) in found.items())
    for kind, seconds in others:
        print(
            f"\nA decode step is {first[1] / seconds:.2f} times as fast with {kind} as {first[0]}."
        )


def print_cache(
    run: Run, kind: str, watches: Watches, read_bytes: Counter[str], bandwidth: float
) -> None:
    floor_ms = 1000 * read_bytes.total() / bandwidth / 1e9
    print(
        f"\nWhat a decode step must read, {read_bytes.total() / 1e9:.2f} GB, takes {floor_ms:.1f} ms"
    )
    print(f"at the {bandwidth:.1f} GB/s that a sum over 256 MiB reached beside it.")
    print_phase(f"Decode, {run.batch} x 1 token, {kind} cache", "decode", watches, read_bytes)
    if not run.filled:
        print_phase(f"Prefill, {run.batch} x {run.prompt} tokens", "prefill", watches, {})


def arguments(run: Run) -> str:
    words = []
    for name, value in vars(run).items():
        listed = value if isinstance(value, list) else [value]
        words += (
            []
            if value is False
            else [f"--{name}", *(map(str, listed) if value is not True else ())]
        )
    return " ".join(words)


if __name__ == "__main__":
    main()
