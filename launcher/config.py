"""The configuration: its schema, and how a command line becomes one.

With launcher/__main__.py the only importer of hydra and omegaconf; past this module there are plain
dataclasses. A key is `section.field`, its help is the field's metadata.
"""

from __future__ import annotations

import dataclasses
import math
import os.path
import reprlib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from launcher.failures import ConfigError
from quant.scheme import QuantScheme


@dataclass(frozen=True)
class Rule:
    """Which values of a key's type are allowed, and how a refusal says so."""

    allows: Callable[[Any], bool]
    words: str


def _at_least(least: int) -> Rule:
    return Rule(lambda value: value >= least, f"at least {least}")


# Below a tenth of a second no network answers; above 2e6, milliseconds do not fit 32 bits.
_SECONDS = Rule(lambda value: 0.1 <= value <= 2e6, "0.1 to 2e6 seconds")


def _key(default: Any, text: str, rule: Rule | None = None) -> Any:
    """A field with its help and what its value must obey; mutable defaults are copied."""
    metadata = {"help": text, "rule": rule}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TaskSection:
    """Which task runs."""

    name: str = _key("generate", "generate, prepare, plan, verify or env")


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
    rope_scaling: dict[str, Any] | None = _key(None, "linear or llama3, with its numbers")
    tie_word_embeddings: bool | None = _key(None, "lm_head is the embedding")
    attention_bias: bool | None = _key(None, "biases of q, k, v and o")
    mlp_bias: bool | None = _key(None, "biases of gate, up and down")
    torch_dtype: str | None = _key(None, "float32, float16 or bfloat16")


@dataclass
class QuantSection:
    """What is quantized; `quant=NAME` takes a preset, `quant.FIELD=…` changes a field of it."""

    quant_method: str | None = _key(None, "rtn, or null for none")
    weight_dtype: str | None = _key(None, "int8 or null")
    activation_dtype: str | None = _key(None, "null: activations stay in the compute dtype")
    kvcache_dtype: str | None = _key(None, "null: the KV cache is in the compute dtype")
    outliers_suppression: str | None = _key(None, "null")
    precision_recovery: str | None = _key(None, "null")
    modules_to_not_convert: list[str] = _key(
        ["lm_head"], "patterns of modules left alone, on the whole path or the last component"
    )
    algorithm_args: dict[str, Any] = _key({}, "arguments of the method")
    weight_quant_granularity: str = _key("per_channel", "per_channel")
    group_size: int | None = _key(None, "null")
    act_quant_granularity: str = _key("per_token", "per_token or per_tensor")
    kvcache_quant_granularity: str = _key("per_token", "per_token or per_channel")
    layer_policies: list[Any] = _key([], "other schemes for some layers; empty")

    def scheme(self) -> QuantScheme:
        """The checked scheme. Raises QuantError."""
        return QuantScheme.from_dict(dataclasses.asdict(self))


@dataclass
class ParallelSection:
    """How the ranks share the model."""

    tp: int | None = _key(
        None,
        "tensor-parallel ranks; null: the environment's, a prepared checkpoint's, else 1",
        _at_least(1),
    )
    dp: int = _key(
        1,
        "data-parallel replicas; 1",
        Rule(lambda value: value == 1, "1 (start one run for each replica)"),
    )
    vocab_emb_dp: bool = _key(False, "the embedding is whole on every rank")
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
    stop: list[str] = _key([], "strings that end an answer; they are cut off")
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
        "tensor-parallel sizes to compare; null: all valid ones to 16",
        Rule(lambda sizes: sizes and min(sizes) >= 1, "a list of sizes of at least 1"),
    )
    batch_size: int = _key(1, "sequences in the KV cache", _at_least(1))
    max_length: int | None = _key(
        None, "tokens of each; null: the context, at most 4096", _at_least(1)
    )
    bandwidth_gb_s: float | None = _key(
        None,
        "read bandwidth of one rank's memory in GB/s; null: measured here and shared",
        Rule(lambda value: 0 < value < math.inf, "a number above 0"),
    )
    json: bool = _key(False, "print JSON instead of tables")


@dataclass
class VerifySection:
    """What `verify` compares and accepts."""

    original: str | None = _key(None, "the unquantized checkpoint of a prepared quantized one")
    tolerance: float | None = _key(
        None,
        "largest top-2 gap at which tokens may differ; null: 1e-3 in float32, 0.5 in 16 bit",
        Rule(lambda value: 0 <= value < math.inf, "a number of at least 0"),
    )


@dataclass
class Config:
    """Every key of the command line."""

    task: TaskSection = field(default_factory=TaskSection)
    model: ModelSection = field(default_factory=ModelSection)
    quant: QuantSection = field(default_factory=QuantSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    generation: GenerationSection = field(default_factory=GenerationSection)
    plan: PlanSection = field(default_factory=PlanSection)
    verify: VerifySection = field(default_factory=VerifySection)
    checkpoint: str | None = _key(
        None, "directory of the checkpoint; null: the embedded demo model"
    )
    output: str | None = _key(None, "directory that prepare writes")
    config: str | None = _key(None, "YAML file of these keys, or a MindFormers predict YAML")
    device: str = _key("auto", "auto, cpu or cuda")
    dtype: str = _key("auto", "auto, float32, float16 or bfloat16")
    prompt: str | None = _key(None, "one prompt, taken as it is typed")
    prompts: list[str] | None = _key(None, "several prompts, a Hydra list: ['one','two']")
    prompts_file: str | None = _key(None, "a text file, one prompt a line; or .jsonl; - is stdin")
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
    "verify.original",
)
_PATHS = frozenset(VERBATIM) - {"prompt"}
# Text of the user's, in which `${…}` and `???` mean nothing to OmegaConf.
TEXTS = (*VERBATIM, "prompts", "generation.stop")
_MOST_VALUES = 100_000
# Keys of which one on the command line stands in for another of a file.
_RIVALS = (
    {"prompt", "prompts", "prompts_file"},
    {"generation.max_new_tokens", "generation.max_length"},
)


def compose(arguments: list[str]) -> Config:
    """A command line of `key=value` as a Config.

    Order, later wins: schema, presets of the groups, the file of `config=`, the command line.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a line that cannot be read.
    """
    overrides = [_split(argument) for argument in arguments]
    values = _file_values(overrides)
    for key, _ in overrides:
        values = _without_rivals(values, key)
    for key, text in overrides:
        values[key] = text if key in VERBATIM or key in GROUPS else _parse(key, text)
    node = _compose_groups({key: value for key, value in values.items() if key in GROUPS})
    texts = {key: values.pop(key) for key in TEXTS if key in values}
    for key, value in values.items():
        if key not in GROUPS:
            _update(node, key, value)
    config = _to_config(node)
    for key, value in texts.items():
        _set_text(config, key, value)
    _check_rules(config)
    return config


def to_yaml(config: Config) -> str:
    """The text of a run.yaml."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def from_yaml(text: str) -> Config:
    """Read what `to_yaml` wrote, without hydra: a worker's start is not slowed by it."""
    values = yaml.safe_load(text)
    sections = {key: kind(**values[key]) for key, kind in _sections().items()}
    return Config(**{**values, **sections})


def keys() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every leaf key, such as `parallel.tp`, with its field."""
    sections = _sections()
    for item in dataclasses.fields(Config):
        if item.name in sections:
            for inner in dataclasses.fields(sections[item.name]):
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


def _split(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals:
        raise ConfigError(_stray_word(argument))
    # A task is chosen as a group, by whichever of its two names.
    key = "task" if key == "task.name" else key
    _check_key(key)
    if key in GROUPS:
        _check_option(key, value)
    return key, os.path.expanduser(value) if key in _PATHS else value


def _stray_word(word: str) -> str:
    tasks = group_options("task")
    close = get_close_matches(word, tasks, n=1)
    if close:
        return f"{word!r} is not a task; did you mean {close[0]}? tasks: {', '.join(tasks)}."
    return f"{word!r} is not a task and not of the form key=value; see shardrun --help."


def _check_key(key: str) -> None:
    known = [name for name, _ in keys()] + list(GROUPS)
    if key in known:
        return
    if key.startswith(("+", "~")):
        raise ConfigError(f"{key!r}: keys are set, never added or removed; write key=value.")
    raise ConfigError(f"{_quoted(key)} is not a key; {_nearest(key, known)}")


def _quoted(key: str) -> str:
    """A key as it was typed; as Python would write it where that is not one printable line."""
    return f"`{key}`" if key.isprintable() else repr(key)


def _nearest(word: str, known: list[str]) -> str:
    """`tensor_parallel.tp`, `tp` and `parallel.tq` should all lead to `parallel.tp`."""
    by_leaf = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    close = by_leaf or get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else "see shardrun --help."


def _check_option(group: str, name: str) -> None:
    options = group_options(group)
    if name not in options:
        close = get_close_matches(name, options, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"`{group}` has no choice {name!r}; {hint}choices: {', '.join(options)}.")


def _file_values(overrides: list[tuple[str, str]]) -> dict[str, Any]:
    paths = [value for key, value in overrides if key == "config"]
    if not paths or paths[-1] == "null":
        return {}
    from launcher.config_file import read_config_file

    try:
        values = read_config_file(Path(paths[-1]))
        _check_size(values, paths[-1])
    except RecursionError as error:
        raise ConfigError(f"`config` {paths[-1]} is nested without end; correct it.") from error
    for key, value in values.items():
        _check_key(key)
        if key in GROUPS:
            _check_option(key, str(value))
    return values


def _check_size(values: Mapping[str, Any], path: str) -> None:
    """A few lines of YAML whose aliases name each other can stand for more than fits in memory."""
    waiting: list[Any] = [values]
    for _ in range(_MOST_VALUES):
        if not waiting:
            return
        value = waiting.pop()
        if isinstance(value, Mapping | list):
            waiting += value.values() if isinstance(value, Mapping) else value
    raise ConfigError(f"`config` {path} must have at most {_MOST_VALUES} values; shorten it.")


def _compose_groups(choices: Mapping[str, str]) -> Any:
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_module("conf", version_base="1.3"):
        node = hydra.compose("config", [f"{key}={value}" for key, value in choices.items()])
    OmegaConf.set_struct(node, True)
    return node


def _parse(key: str, text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except (HydraException, RecursionError) as error:
        raise ConfigError(
            f"`{key}` cannot be read from {_shown(text)}; put the value in quotes: {key}=\"'…'\"."
        ) from error
    if override.is_sweep_override():
        raise ConfigError(
            f"`{key}` must be one value, but is {_shown(text)}; lists go in brackets: [a,b]."
        )
    return override.value()


def _without_rivals(values: dict[str, Any], key: str) -> dict[str, Any]:
    """What a key of the command line replaces: a preset, all fields of its group."""
    rivals = next((group for group in _RIVALS if key in group), set())
    prefix = f"{key}." if key in GROUPS else "\0"
    return {
        name: value
        for name, value in values.items()
        if name not in rivals and not name.startswith(prefix)
    }


def _update(node: Any, key: str, value: Any) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.update(node, key, value, merge=False)
        OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"`{key}` must be {_kind(key)}, but is {_shown(value)}.") from error


def _set_text(config: Config, key: str, value: Any) -> None:
    if key in _PATHS and value == "null":
        value = None
    is_list = key not in VERBATIM
    if is_list and isinstance(value, list):
        for item in value:
            _check_text(key, item)
    elif value is not None and not is_list:
        _check_text(key, value)
    elif value is not None or "null" not in _kind(key):
        raise ConfigError(f"`{key}` must be {_kind(key)}, but is {_shown(value)}.")
    section, _, name = key.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)


def _check_text(key: str, value: object) -> None:
    """A number or a word like `true` has lost how it was typed; a broken character cannot be
    written to any file."""
    if not isinstance(value, str):
        raise ConfigError(
            f"`{key}` must be {_kind(key)}, but holds {_shown(value)}; put it in quotes: ['…']."
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"`{key}` must be UTF-8 text, but is {value!r}; type it anew.")
    if key in _PATHS and (not value or "\0" in value):
        raise ConfigError(f"`{key}` must be a path, but is {value!r}; leave it out, or give one.")


def _shown(value: object) -> str:
    """A value of any size as part of a sentence."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxlist, shown.maxdict = 3, 10, 10
    shown.maxstring = shown.maxother = shown.maxlong = 200
    return shown.repr(value)


def _check_rules(config: Config) -> None:
    for key, item in keys():
        value, rule = attrgetter(key)(config), item.metadata["rule"]
        if value is not None and rule and not rule.allows(value):
            raise ConfigError(f"`{key}` must be {rule.words}, but is {value}.")


def _kind(key: str) -> str:
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


def _to_config(node: Any) -> Config:
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config
