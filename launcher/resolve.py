"""From a composed configuration to a Job: every default filled in, every value checked.

It runs before a process is started or a weight is read, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.environment.size import decide_size
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import ConfigError
from launcher.generation_notes import generation_notes
from launcher.host.device import check_names, remedy
from launcher.host.gpus import count_gpus
from launcher.host.kernels import check_kernel, choose_kernel
from launcher.job import Job, tokenizer_path, with_tp
from launcher.original import check_original
from launcher.prompts import DEMO_PROMPTS, make_prompts
from launcher.schema import Config, GenerationSection, QuantSection, model_overrides
from launcher.text import open_tokenizer
from parallel.checkpoint.config_values import says_model
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.layout_checks import check_calibrated
from parallel.checkpoint.open import Checkpoint, open_checkpoint, open_random, read_config
from parallel.checkpoint.readers.mindformers.files import weights_directory
from parallel.checkpoint.readers.mindformers.source import MindFormersSource
from parallel.checkpoint.readers.prepared import PreparedSource

DEMO = Path(__file__).parent / "demo"
DEMO_TP = 2


@dataclass(frozen=True)
class Resolved:
    """A configuration with its checkpoint opened.

    Attributes:
        notes: what the user should know; said on stderr.
    """

    config: Config
    checkpoint: Checkpoint
    layout: Layout
    notes: tuple[str, ...]


def resolve(config: Config, environment: WorkerEnvironment) -> Resolved:
    """Open the checkpoint, decide the number of ranks, and check that they fit.

    Raises:
        ConfigError, LaunchError, CheckpointError, ModelError, QuantError: one sentence each.
    """
    check_names(config.device, config.dtype)
    check_kernel(config)
    check_generation(config.generation)
    scheme = config.quant.scheme()
    checkpoint = open_job(config)
    check_has_sums(config, checkpoint)
    path = checkpoint.path
    if scheme.needs_calibration and not is_shape_alone(config) and checkpoint.own_scheme is None:
        _check_calibrates(config)
    default = DEMO_TP if path == DEMO else 1
    size, notes = _decide_size(config, environment, checkpoint.prepared_size, default)
    is_random = is_shape_alone(config)
    config = with_tp(config if is_random else replace(config, checkpoint=str(path)), size)
    layout = checkpoint.layout(scheme, vocab_emb_dp=config.parallel.vocab_emb_dp)
    layout.check_tp(size)
    _check_shards(config, checkpoint, environment)
    layout.check_exact_sums(config.parallel.exact_sums)
    if config.task.name != "prepare":
        check_calibrated(layout, checkpoint.source.tensors, str(path))
    if checkpoint.own_scheme is not None:
        config = replace(config, quant=_quant_section(layout))
    if not is_random:
        notes += _override_notes(path, model_overrides(config)) + checkpoint.notes
        notes += generation_notes(checkpoint, config.generation) + _end_note(config, checkpoint)
    return Resolved(config, checkpoint, layout, notes)


def _decide_size(
    config: Config, environment: WorkerEnvironment, prepared: int | None, default: int
) -> tuple[int, tuple[str, ...]]:
    """As decide_size, but the processes that prepare need not be as many as the ranks they cut for."""
    tp = config.parallel.tp
    if config.task.name == "prepare" and tp is not None and environment.size is not None:
        return tp, ()
    return decide_size(environment, tp, prepared, default)


def _check_shards(config: Config, checkpoint: Checkpoint, environment: WorkerEnvironment) -> None:
    """A directory that `prepare.ranks` made for some ranks must have those that run here."""
    source, size = checkpoint.source, config.parallel.tp
    if not isinstance(source, PreparedSource) or len(source.ranks) == source.size:
        return
    assert size is not None
    alone = config.parallel.simulate_rank if environment.is_plain else environment.rank
    needed = set(range(size)) if alone is None else {alone}
    if size != source.size or not needed <= set(source.ranks):
        here = ", ".join(map(str, source.ranks))
        raise ConfigError(
            f"`checkpoint` {checkpoint.path} has the shards of ranks {here} of {source.size} only, but "
            f"{config.task.name} needs {'one' if len(needed) == 1 else 'all'} of {size}; give one that "
            "was prepared for them, or start those ranks alone."
        )


def _check_calibrates(config: Config) -> None:
    """What needs calibration is made by prepare alone; plan only counts it."""
    if config.task.name not in ("prepare", "plan"):
        raise ConfigError(
            f"`quant` {config.quant.scheme().label} by {config.quant.quant_method} needs calibration, "
            f"which {config.task.name} does not do; run shardrun prepare with it first, and give "
            "checkpoint=DIRECTORY of what that wrote."
        )


def open_job(config: Config) -> Checkpoint:
    """The checkpoint of a job: a directory, the demo model, or random weights for bench."""
    if config.task.name == "bench" and is_shape_alone(config):
        return open_random(model_overrides(config), config.quant.scheme(), config.seed)
    path, overrides = checkpoint_path(config), model_overrides(config)
    return open_checkpoint(path, overrides, scheme=config.quant.scheme())


def check_has_sums(config: Config, checkpoint: Checkpoint) -> None:
    """Raises ConfigError where sums are asked for and there are none."""
    # MindSpore's own are looked for in the files, once prepare is about to read them.
    may_have = isinstance(checkpoint.source, MindFormersSource) and config.task.name == "prepare"
    has_sums = isinstance(checkpoint.source, PreparedSource)
    if config.verify_checksums and not has_sums and not may_have:
        raise ConfigError(
            f"`verify_checksums` has no effect on {checkpoint.path}, which has no manifest with sums; "
            "leave it out, or give a prepared checkpoint."
        )


def is_shape_alone(config: Config) -> bool:
    """Whether a model is described, but no checkpoint given."""
    return config.checkpoint is None and bool(model_overrides(config))


def make_job(
    config: Config, environment: WorkerEnvironment, *, reads_prompts: bool = True
) -> tuple[Job, tuple[str, ...]]:
    """The job of a task of ranks, and what to say about it.

    Args:
        reads_prompts: False leaves them out, where another rank reads them.
    """
    if config.task.name == "bench":
        from launcher.tasks.bench.sizes import make_bench_job

        return make_bench_job(config, environment, chooses_kernel=reads_prompts)
    if config.task.name == "prepare":
        from launcher.tasks.prepare.job import make_prepare_job

        return make_prepare_job(config, environment, reads_texts=reads_prompts)
    if config.task.name == "eval":
        from launcher.tasks.eval.job import make_eval_job

        return make_eval_job(config, environment, reads_exam=reads_prompts)
    resolved = resolve(config, environment)
    check_effects(config)
    check_original(config, resolved.checkpoint)
    check_gpus(config, resolved, environment)
    if not reads_prompts:
        return Job(resolved.config, ()), resolved.notes
    tokenizer = open_tokenizer(tokenizer_path(config) or resolved.checkpoint.path)
    default = DEMO_PROMPTS if resolved.checkpoint.path == DEMO else None
    context = resolved.checkpoint.config.max_position_embeddings
    prompts = make_prompts(config, tokenizer, context, default)
    _check_token_ids(prompts, resolved.checkpoint)
    # Last: the first time on a machine it takes seconds, which a refusal should not.
    config, notes = choose_kernel(resolved.config, resolved.layout.labels)
    return Job(config, prompts), resolved.notes + notes


def checkpoint_path(config: Config) -> Path:
    """The checkpoint's directory; the embedded demo model where none is given.

    Raises:
        ConfigError: a shape is named, but no weights.
        CheckpointError: a file is named, and others are beside it.
    """
    if config.checkpoint is not None:
        return weights_directory(Path(config.checkpoint).absolute())
    if is_shape_alone(config):
        raise ConfigError("`model` names a shape without weights; give checkpoint=DIRECTORY too.")
    return DEMO


def check_generation(section: GenerationSection) -> None:
    """Raises ConfigError for two lengths at once, or a key that would have no effect."""
    if section.max_new_tokens is not None and section.max_length is not None:
        raise ConfigError(
            "`generation.max_new_tokens` and `generation.max_length` are both given; give one."
        )
    if "" in section.stop:
        raise ConfigError(
            "`generation.stop` has an empty string, which ends every answer; drop it."
        )
    _check_sampling_is_on(section)


def _check_sampling_is_on(section: GenerationSection) -> None:
    """A temperature without sampling would be ignored, and its user would not know."""
    defaults = GenerationSection()
    for key in ("temperature", "top_k", "top_p", "seed"):
        if not section.do_sample and getattr(section, key) != getattr(defaults, key):
            raise ConfigError(
                f"`generation.{key}` has no effect while generation.do_sample is false; "
                "write generation.do_sample=true as well."
            )


def check_effects(config: Config) -> None:
    """Refuse what the task would pass over."""
    if config.task.name == "verify" and config.generation.stop:
        raise ConfigError(
            "`generation.stop` has no effect on verify, which compares tokens; drop it."
        )
    if config.parallel.simulate_rank is not None and config.task.name != "bench":
        raise ConfigError(
            f"`parallel.simulate_rank` is for bench, but the task is {config.task.name}; leave it out."
        )
    if config.output is not None:
        raise ConfigError(
            f"`output` is where prepare and export write, but the task is {config.task.name}; "
            "leave it out (results are under `run_root`)."
        )


def check_gpus(config: Config, resolved: Resolved, environment: WorkerEnvironment) -> None:
    """All ranks are on this host when it is we who start them."""
    if config.device != "cuda" or not environment.is_plain:
        return
    size, num_gpus = resolved.config.parallel.tp, count_gpus()
    assert size is not None
    if num_gpus is not None and size > num_gpus:
        raise ConfigError(
            f"`device` is cuda, but this host has {num_gpus} GPUs for {size} ranks; "
            f"{remedy(num_gpus)}."
        )


def _override_notes(path: Path, overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """A `model` key that contradicts config.json wins, and is said."""
    if not says_model(path):
        return ()
    own = read_config(path)
    if "dtype" in own:  # transformers 5
        own["torch_dtype"] = own["dtype"]
    return tuple(
        f"model.{key}={value} stands in for config.json's {own.get(key)}"
        for key, value in overrides.items()
        if own.get(key) != value
    )


def _end_note(config: Config, checkpoint: Checkpoint) -> tuple[str, ...]:
    """A shape that was given in place of config.json may leave out what ends an answer."""
    ends = checkpoint.eos_token_ids or config.generation.ignore_eos
    if ends or says_model(checkpoint.path) or config.task.name not in ("generate", "verify"):
        return ()
    return (
        "nothing says which token ends an answer: each goes on to its length (model.eos_token_id=[…])",
    )


def _quant_section(layout: Layout) -> QuantSection:
    """The scheme that a prepared checkpoint brings, so that run.yaml says what really runs."""
    return QuantSection(**layout.scheme.to_dict())


def _check_token_ids(prompts: tuple[Any, ...], checkpoint: Checkpoint) -> None:
    vocab_size = checkpoint.config.vocab_size
    for prompt in prompts:
        highest = max(prompt.token_ids)
        if highest >= vocab_size:
            raise ConfigError(
                f"the tokenizer gives token {highest}, but vocab_size is {vocab_size}; "
                "use the tokenizer of this checkpoint."
            )
