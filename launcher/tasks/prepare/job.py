"""The job of a `prepare` on ranks: its keys filled in and checked, the texts to calibrate with read.

Needs no torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launcher.calibration_texts import CalibrationTexts, read_texts
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import ConfigError
from launcher.job import Job, tokenizer_path
from launcher.output import new_directory
from launcher.questions import DEMO_TEMPLATE, TEMPLATE
from launcher.resolve import DEMO, Resolved, check_gpus, resolve
from launcher.schema import CalibrationSection, Config, ParallelSection
from launcher.text import open_tokenizer

_LONGEST_DEFAULT = 512
# Ranks wait for each other where one has a sample more; a layer may take minutes.
_LEAST_TIMEOUT_S = 7200.0


def calibrates(config: Config) -> bool:
    """Whether this prepare reads texts: its scheme needs some, or they are given for the report."""
    return (
        config.quant.scheme().needs_calibration
        or config.calibration.data is not None
        or config.quant.max_perplexity_increase is not None
    )


def check_prepare(config: Config) -> Path:
    """The directory to write.

    Raises:
        ConfigError: no output is named, it exists, or a key would have no effect.
    """
    output = new_directory(config)
    if not calibrates(config):
        _check_unused(config.calibration)
    return output


def make_prepare_job(
    config: Config, environment: WorkerEnvironment, *, reads_texts: bool
) -> tuple[Job, tuple[str, ...]]:
    """The job, and what to say about it.

    Args:
        reads_texts: False leaves them out, where another rank reads them.

    Raises:
        ConfigError, QuantError and what `resolve` raises: one sentence each.
    """
    output = check_prepare(config)
    resolved = resolve(config, environment)
    check_ranks(resolved.config)
    config = replace(
        resolved.config,
        output=str(output),
        device="cpu",
        parallel=_patient(resolved.config.parallel),
    )
    if not calibrates(config):
        return Job(config, ()), resolved.notes
    _check_calibration(resolved)
    check_gpus(config, resolved, environment)
    config = replace(config, calibration=_settle(config.calibration, resolved))
    if not reads_texts:
        return Job(config, ()), resolved.notes
    texts = _read(config, resolved)
    return Job(config, (), texts=texts), (*resolved.notes, *_notes(config.calibration, texts))


def check_ranks(config: Config) -> None:
    """Raise ConfigError unless `prepare.ranks` are some of parallel.tp."""
    ranks, tp = config.prepare.ranks, config.parallel.tp
    if ranks is not None and tp is not None and max(ranks) >= tp:
        raise ConfigError(
            f"`prepare.ranks` must be 0 to {tp - 1} at parallel.tp={tp}, but is {ranks}; lower them, or "
            "give the parallel.tp that you mean."
        )


def _check_calibration(resolved: Resolved) -> None:
    if resolved.checkpoint.own_scheme is not None:
        raise ConfigError(
            f"`checkpoint` {resolved.checkpoint.path} is prepared or quantized already, so there is "
            "nothing to calibrate; give the checkpoint it was made from, or drop the calibration."
        )
    if not resolved.layout.schemes and resolved.layout.scheme.kvcache_dtype is None:
        has_gate = resolved.config.quant.max_perplexity_increase is not None
        key = "quant.max_perplexity_increase" if has_gate else "calibration.data"
        raise ConfigError(f"`{key}` has no effect, as nothing is quantized; write quant=NAME too.")
    from parallel.calibration.limits import check_layers

    check_layers(resolved.layout)


def _check_unused(section: CalibrationSection) -> None:
    for key, value in vars(section).items():
        if value != getattr(CalibrationSection(), key):
            raise ConfigError(
                f"`calibration.{key}` has no effect without calibration.data; give that too, or drop "
                "it."
            )


def _settle(section: CalibrationSection, resolved: Resolved) -> CalibrationSection:
    """Every key of the section with its value."""
    is_demo = resolved.checkpoint.path == DEMO
    if section.data is None and not is_demo:
        raise ConfigError(
            f"`quant` {resolved.layout.scheme.quant_method} needs texts to calibrate with; write "
            "calibration.data=FILE."
        )
    if section.data is None:
        section = replace(section, data=str(DEMO / "calibration.txt"))
        if section.held_out is None and section.num_held_out:
            section = replace(section, held_out=str(DEMO / "held_out.txt"))
    context = resolved.checkpoint.config.max_position_embeddings
    length = section.max_length or min(context, _LONGEST_DEFAULT)
    if length > context:
        raise ConfigError(
            f"`calibration.max_length` must be at most the model's context, {context} tokens, but is "
            f"{length}; lower it."
        )
    if section.held_out is not None and not section.num_held_out:
        raise ConfigError(
            "`calibration.held_out` has no effect while calibration.num_held_out is 0; raise that, or "
            "drop it."
        )
    if resolved.config.quant.max_perplexity_increase is not None and not section.num_held_out:
        raise ConfigError(
            "`quant.max_perplexity_increase` needs held-out texts, but calibration.num_held_out is 0; "
            "raise it."
        )
    return replace(section, max_length=length)


def _patient(section: ParallelSection) -> ParallelSection:
    return replace(section, timeout_s=max(section.timeout_s, _LEAST_TIMEOUT_S))


def _read(config: Config, resolved: Resolved) -> CalibrationTexts:
    section = config.calibration
    assert section.max_length is not None
    template = DEMO_TEMPLATE if resolved.checkpoint.path == DEMO else TEMPLATE
    tokenizer = open_tokenizer(tokenizer_path(config) or resolved.checkpoint.path)
    texts = read_texts(section, tokenizer, section.max_length, config.seed, template)
    highest = max(max(ids) for ids in (*texts.samples, *texts.held_out))
    if highest >= resolved.checkpoint.config.vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {highest}, but vocab_size is "
            f"{resolved.checkpoint.config.vocab_size}; use the tokenizer of this checkpoint."
        )
    if config.quant.max_perplexity_increase is not None and not texts.held_out:
        raise ConfigError(
            "`quant.max_perplexity_increase` needs held-out texts, but calibration.data has none "
            "left; give calibration.held_out, or fewer calibration.num_samples."
        )
    return texts


def _notes(section: CalibrationSection, texts: CalibrationTexts) -> tuple[str, ...]:
    notes = []
    if len(texts.samples) < section.num_samples:
        notes.append(
            f"calibration.data has {len(texts.samples)} texts, fewer than calibration.num_samples="
            f"{section.num_samples}; all are used"
        )
    if len(texts.held_out) < section.num_held_out:
        notes.append(
            f"{len(texts.held_out)} held-out texts are left of calibration.num_held_out="
            f"{section.num_held_out}; calibration.held_out names a file of its own"
        )
    return tuple(notes)
