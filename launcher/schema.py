"""The schema of the configuration: every key, its type, its default, its rule and its help.

A key is `section.field`. These are plain dataclasses; launcher/config.py fills them.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml

from quant.scheme import QuantScheme


@dataclass(frozen=True)
class Rule:
    """Which values of a key's type are allowed, and how a refusal says so."""

    allows: Callable[[Any], bool]
    words: str


COLLECTIVES = ("auto", "shared_memory", "gloo")


# Above any size; nothing that is counted, allocated or made a float stops it before.
_MOST = 2**31 - 1
# As many query heads as are read; no more ranks can share them.
_MOST_RANKS = 65536


def _at_least(least: int, most: int = _MOST) -> Rule:
    return Rule(lambda value: least <= value <= most, f"at least {least} and at most {most}")


# Below a tenth of a second no network answers; above 2e6, milliseconds do not fit 32 bits.
_SECONDS = Rule(lambda value: 0.1 <= value <= 2e6, "0.1 to 2e6 seconds")


_SIZES = Rule(
    lambda sizes: sizes and min(sizes) >= 1 and max(sizes) <= _MOST,
    f"a list of sizes of at least 1 and at most {_MOST}",
)
_RANKS = Rule(
    lambda ranks: ranks and min(ranks) >= 0 and len(set(ranks)) == len(ranks),
    "a list of different ranks",
)
_ABOVE_ZERO = Rule(lambda value: 0 < value <= 1e15, "a number above 0 and at most 1e15")


def _key(default: Any, text: str, rule: Rule | None = None) -> Any:
    """A field with its help and what its value must obey; mutable defaults are copied."""
    metadata = {"help": text, "rule": rule}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TaskSection:
    """Which task runs."""

    name: str = _key(
        "generate", "generate, prepare, export, plan, verify, eval, bench, check or env"
    )


@dataclass
class ModelSection:
    """The model's shape, by the names of `config.json`; null takes the checkpoint's value."""

    architectures: list[str] | None = _key(None, "LlamaForCausalLM and its kin")
    vocab_size: int | None = _key(None, "token ids")
    hidden_size: int | None = _key(None, "width of the residual stream")
    intermediate_size: int | None = _key(None, "width of the FFN")
    num_hidden_layers: int | None = _key(None, "decoder layers")
    num_attention_heads: int | None = _key(None, "query heads")
    num_key_value_heads: int | None = _key(None, "key and value heads")
    head_dim: int | None = _key(None, "width of a head; null: hidden_size / num_attention_heads")
    max_position_embeddings: int | None = _key(None, "context length in tokens")
    rms_norm_eps: float | None = _key(None, "epsilon of the norms")
    rope_theta: float | None = _key(None, "base of the rotary frequencies")
    rope_scaling: dict[str, Any] | None = _key(None, "linear, llama3 or yarn, with its numbers")
    sliding_window: int | None = _key(None, "positions that a query sees, in layers with a window")
    use_sliding_window: bool | None = _key(None, "of Qwen: whether any layer has a window")
    max_window_layers: int | None = _key(None, "of Qwen: the first layer with a window")
    layer_types: list[str] | None = _key(None, "of Qwen: sliding_attention or full_attention")
    tie_word_embeddings: bool | None = _key(None, "lm_head is the embedding")
    attention_bias: bool | None = _key(None, "biases of q, k, v and o")
    mlp_bias: bool | None = _key(None, "biases of gate, up and down")
    torch_dtype: str | None = _key(None, "float32, float16 or bfloat16")


@dataclass
class QuantSection:
    """What is quantized; `quant=NAME` takes a preset, `quant.FIELD=…` changes a field of it."""

    quant_method: str | None = _key(None, "rtn, smooth_quant, ptq, or null for none")
    weight_dtype: str | None = _key(None, "int8, int4 or null")
    activation_dtype: str | None = _key(None, "null: activations stay in the compute dtype")
    kvcache_dtype: str | None = _key(None, "int8, or null: the KV cache is in the compute dtype")
    outliers_suppression: str | None = _key(
        None, "smooth, awq or null; of ptq, and smooth of smooth_quant"
    )
    precision_recovery: str | None = _key(None, "gptq or null; of ptq")
    modules_to_not_convert: list[str] = _key(
        ["lm_head"], "patterns of modules left alone, on the whole path or the last component"
    )
    algorithm_args: dict[str, Any] = _key({}, "arguments of the method")
    weight_quant_granularity: str = _key("per_channel", "per_channel or per_group")
    group_size: int | None = _key(None, "32, 64 or 128 columns that share a scale, with per_group")
    act_quant_granularity: str = _key("per_token", "per_token or per_tensor")
    kvcache_quant_granularity: str = _key(
        "per_token", "per_token, or per_channel with the static scales of the checkpoint"
    )
    layer_policies: list[Any] = _key(
        [], "other fields for some modules, as in [{pattern:'*.down_proj',weight_dtype:int8}]"
    )
    max_perplexity_increase: float | None = _key(
        None,
        "percent by which the held-out perplexity may grow in prepare; above it nothing is written",
        Rule(lambda value: value >= 0, "at least 0"),
    )

    def scheme(self) -> QuantScheme:
        """The checked scheme. Raises QuantError."""
        values = dataclasses.asdict(self)
        del values["max_perplexity_increase"]  # of a run, not of what it makes
        return QuantScheme.from_dict(values)


@dataclass
class PrepareSection:
    """What `prepare` writes."""

    ranks: list[int] | None = _key(
        None,
        "whose shards are written, of parallel.tp, as for the disk of one host; null: of all",
        _RANKS,
    )


@dataclass
class CalibrationSection:
    """The texts that `prepare` calibrates with, where the scheme needs some or a file is given."""

    data: str | None = _key(
        None, "BoolQ's .jsonl, any .jsonl with a text field, or a plain text; - is stdin"
    )
    text_field: str | None = _key(
        None, "the field of a .jsonl; null: text, or BoolQ's passage and question"
    )
    num_samples: int = _key(128, "texts, drawn by `seed`", _at_least(1))
    max_length: int | None = _key(
        None, "tokens of a text, longer ones are cut; null: the context, at most 512", _at_least(2)
    )
    held_out: str | None = _key(
        None, "a file of texts for the perplexity in the report; null: others of calibration.data"
    )
    num_held_out: int = _key(16, "texts of that, each of at most max_length tokens", _at_least(0))


@dataclass
class ParallelSection:
    """How the ranks share the model."""

    tp: int | None = _key(
        None,
        "tensor-parallel ranks; null: the environment's, a prepared checkpoint's, else 1",
        _at_least(1, _MOST_RANKS),
    )
    dp: int = _key(
        1,
        "data-parallel replicas; 1",
        Rule(lambda value: value == 1, "1 (start one run for each replica)"),
    )
    vocab_emb_dp: bool = _key(False, "the embedding is whole on every rank")
    threads: int | None = _key(
        None,
        "CPU threads of each rank; null: OMP_NUM_THREADS, else the host's cores divided",
        _at_least(1),
    )
    exact_sums: bool | None = _key(
        None,
        "add the partial sums of quantized products as integers: the same bits at every tp, for one "
        "more small all-reduce each; not of grouped weights; null: where activations are int8",
    )
    pin: bool = _key(True, "bind each rank to its share of the host's cores")
    simulate_rank: int | None = _key(
        None, "bench: run this rank of parallel.tp alone, and estimate the whole job", _at_least(0)
    )
    collectives: str = _key(
        "auto",
        "how ranks on CPUs exchange: auto, shared_memory or gloo; auto: memory inside a host",
        Rule(lambda value: value in COLLECTIVES, "auto, shared_memory or gloo"),
    )
    start_timeout_s: float = _key(300.0, "deadline for all ranks to arrive, in seconds", _SECONDS)
    timeout_s: float = _key(300.0, "deadline of one collective, in seconds", _SECONDS)


@dataclass
class GenerationSection:
    """How text is made; the names are those of transformers' GenerationConfig."""

    max_new_tokens: int | None = _key(
        None, "most tokens of an answer; null: 128, within the context", _at_least(1)
    )
    max_length: int | None = _key(None, "most tokens of prompt and answer together", _at_least(1))
    do_sample: bool = _key(False, "sample instead of taking the most likely token")
    # float32 logits must survive a division by these two, and a multiplication.
    temperature: float = _key(
        1.0,
        "divides the logits",
        Rule(lambda value: 1e-5 <= value <= 1e5, "1e-5 to 1e5 (do_sample=false is greedy)"),
    )
    top_k: int = _key(0, "keep the k most likely tokens; 0 keeps all", _at_least(0))
    top_p: float = _key(
        1.0,
        "keep the most likely tokens of this total probability",
        Rule(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    )
    repetition_penalty: float = _key(
        1.0,
        "above 1: tokens seen before become less likely",
        Rule(lambda value: 1e-5 <= value <= 1e5, "1e-5 to 1e5"),
    )
    seed: int = _key(0, "of the sampling; each prompt has its own generator of seed and index")
    stop: list[str] = _key([], "strings that end an answer, special tokens too; they are cut off")
    ignore_eos: bool = _key(False, "go on after the end-of-sequence token")
    max_num_seqs: int = _key(8, "sequences that run at once", _at_least(1))
    prefill_chunk: int = _key(
        512, "most tokens of one prefill step; bounds its memory", _at_least(1)
    )


@dataclass
class PlanSection:
    """What `plan` counts."""

    tp: list[int] | None = _key(
        None,
        "tensor-parallel sizes to compare; null: all valid ones to plan.max_tp",
        _SIZES,
    )
    max_tp: int = _key(
        16,
        "largest size to compare, and to say why others do not work",
        _at_least(1, _MOST_RANKS),
    )
    batch_size: int = _key(1, "sequences in the KV cache", _at_least(1))
    max_length: int | None = _key(
        None, "tokens of each; null: the context, at most 4096", _at_least(1)
    )
    bandwidth_gb_s: float | None = _key(
        None,
        "read bandwidth of one rank's memory in GB/s; null: measured here and shared",
        _ABOVE_ZERO,
    )
    memory_gb: float | None = _key(
        None, "memory of one rank in GB; null: this host's, shared by its ranks", _ABOVE_ZERO
    )
    disk_gb_s: float | None = _key(
        None,
        "how fast the disks read and write, in GB/s; null: measured where the checkpoint's files are",
        _ABOVE_ZERO,
    )
    tflops: float | None = _key(
        None,
        "products of one rank in 1e12 operations a second, for the prefill; null: not said",
        _ABOVE_ZERO,
    )
    picture: str | None = _key(
        None, "draw the memory of a rank at each size into this file (.png, .svg, .pdf)"
    )
    json: bool = _key(False, "print JSON instead of tables")


@dataclass
class ExportSection:
    """How `export` writes."""

    max_shard_bytes: int = _key(
        5_000_000_000,
        "weights of a file at most, in bytes; above it there are several",
        _at_least(1, 2**63 - 1),
    )


@dataclass
class VerifySection:
    """What `verify` compares and accepts."""

    original: str | None = _key(None, "the unquantized checkpoint of a prepared quantized one")
    tolerance: float | None = _key(
        None,
        "largest top-2 gap of tokens that differ; null: 1e-3 (float32), 0.1 (float16), 0.5 (bfloat16)",
        Rule(lambda value: 0 <= value < math.inf, "a number of at least 0"),
    )


@dataclass
class EvalSection:
    """What `eval` measures, and how; the demo model has a text and questions of its own."""

    original: str | None = _key(None, "the unquantized checkpoint of a prepared quantized one")
    text: str | None = _key(None, "a text file whose perplexity is measured; - is stdin")
    window: int | None = _key(
        None, "tokens of a window; null: the context, at most 2048", _at_least(2)
    )
    stride: int | None = _key(
        None, "tokens from one window to the next; null: half a window", _at_least(1)
    )
    questions: str | None = _key(
        None, ".jsonl of question, passage and answer (true, false), as BoolQ's; - is stdin"
    )
    max_questions: int | None = _key(None, "the first of them alone; null: all", _at_least(1))
    template: str | None = _key(
        None,
        "the prompt, with {passage} and {question}; null: lm-evaluation-harness's, or the demo's own",
    )
    choices: list[str] = _key(
        [" yes", " no"],
        "what follows the prompt, for true and for false",
        Rule(
            lambda words: len(words) == 2 and all(words) and words[0] != words[1],
            "two different texts, for true and for false",
        ),
    )


@dataclass
class BenchSection:
    """What `bench` measures: each batch size with each prompt length, at each size of `tp`."""

    tp: list[int] | None = _key(
        None, "tensor-parallel sizes, one after the other; null: parallel.tp", _SIZES
    )
    batch_sizes: list[int] = _key([1, 8], "sequences that run at once", _SIZES)
    prompt_lengths: list[int] = _key([128], "tokens of each prompt", _SIZES)
    new_tokens: int = _key(32, "decode steps that are timed, after each prefill", _at_least(1))
    repeats: int = _key(5, "runs of each case; medians are reported", _at_least(1))
    warmup: int = _key(1, "runs of each case before, not counted", _at_least(0))
    collective_latency_us: float | None = _key(
        None, "simulate_rank: what each collective costs, in microseconds; null: 30", _ABOVE_ZERO
    )
    collective_gb_s: float | None = _key(
        None, "simulate_rank: how fast a rank sends and receives, in GB/s; null: 5", _ABOVE_ZERO
    )
    plot: bool = _key(True, "draw decode.png, where matplotlib is installed")
    profile: bool = _key(False, "one more decode of the first case under torch's profiler")


@dataclass
class Config:
    """Every key of the command line."""

    task: TaskSection = field(default_factory=TaskSection)
    model: ModelSection = field(default_factory=ModelSection)
    quant: QuantSection = field(default_factory=QuantSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    generation: GenerationSection = field(default_factory=GenerationSection)
    plan: PlanSection = field(default_factory=PlanSection)
    prepare: PrepareSection = field(default_factory=PrepareSection)
    calibration: CalibrationSection = field(default_factory=CalibrationSection)
    export: ExportSection = field(default_factory=ExportSection)
    verify: VerifySection = field(default_factory=VerifySection)
    eval: EvalSection = field(default_factory=EvalSection)
    bench: BenchSection = field(default_factory=BenchSection)
    checkpoint: str | None = _key(
        None, "directory of the checkpoint; null: the embedded demo model"
    )
    verify_checksums: bool = _key(
        False, "hash a prepared checkpoint before it is used, each rank its own shard"
    )
    output: str | None = _key(
        None, "directory that prepare or export writes; plan looks at the room on its disk"
    )
    config: str | None = _key(None, "YAML file of these keys, or a MindFormers predict YAML")
    device: str = _key("auto", "auto, cpu or cuda")
    dtype: str = _key("auto", "auto, float32, float16 or bfloat16")
    kernel: str = _key(
        "auto",
        "products with int8 weights: auto, native, onednn or reference; all give the same bits, auto "
        "takes the fastest here",
    )
    prompt: str | None = _key(None, "one prompt, taken as it is typed")
    prompts: list[str] | None = _key(None, "several prompts, a Hydra list: ['one','two']")
    prompts_file: str | None = _key(None, "a text file, one prompt a line; or .jsonl; - is stdin")
    seed: int = _key(
        0,
        "of random weights and prompts, and of which texts calibrate (sampling has generation.seed)",
    )
    run_root: str = _key("outputs", "where run directories are made")


GROUPS = ("task", "model", "quant", "parallel", "generation")
# Taken as they are typed: Hydra's grammar would refuse or change what paths and prompts hold.
VERBATIM = (
    "checkpoint",
    "output",
    "config",
    "prompts_file",
    "prompt",
    "run_root",
    "plan.picture",
    "verify.original",
    "calibration.data",
    "calibration.held_out",
    "eval.original",
    "eval.text",
    "eval.questions",
    "eval.template",
)
# Files that are read as text; `-` is stdin.
READ_TEXTS = (
    "prompts_file", "calibration.data", "calibration.held_out", "eval.text", "eval.questions",
)  # fmt: skip
PATHS = frozenset(VERBATIM) - {"prompt", "eval.template"}
# Text of the user's, in which `${…}` and `???` mean nothing to OmegaConf.
TEXTS = (*VERBATIM, "prompts", "generation.stop", "eval.choices")


def to_yaml(config: Config) -> str:
    """The text of a run.yaml."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def from_yaml(text: str) -> Config:
    """Read what `to_yaml` wrote, without hydra: a worker's start is not slowed by it."""
    values = yaml.safe_load(text)
    parts = {key: kind(**values[key]) for key, kind in _sections().items()}
    return Config(**{**values, **parts})


def keys() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every leaf key, such as `parallel.tp`, with its field."""
    parts = _sections()
    for item in dataclasses.fields(Config):
        if item.name in parts:
            for inner in dataclasses.fields(parts[item.name]):
                yield f"{item.name}.{inner.name}", inner
        else:
            yield item.name, item


def group_options(group: str) -> list[str]:
    """The named choices of a group: the stems of its YAML files."""
    entries = files("conf").joinpath(group).iterdir()
    return sorted(item.name[:-5] for item in entries if item.name.endswith(".yaml"))


def _sections() -> dict[str, Any]:
    hints = typing.get_type_hints(Config)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def kind_of(key: str) -> str:
    """A field's type in words."""
    *section, name = key.split(".")
    owner = _sections()[section[0]] if section else Config
    words = {
        "str": "a string", "int": "an integer", "float": "a number", "bool": "true or false",
        "list[str]": "a list of strings", "list[int]": "a list of integers",
        "list[Any]": "a list", "dict[str, Any]": "a mapping",
    }  # fmt: skip
    kinds = [part.strip() for part in str(owner.__annotations__[name]).split("|")]
    return " or ".join("null" if kind == "None" else words.get(kind, kind) for kind in kinds)
