"""The job of `eval`: its keys filled in and checked, its text and questions read. Needs no torch."""

from __future__ import annotations

import sys
from dataclasses import replace

from launcher.environment.worker import WorkerEnvironment
from launcher.exam import Exam
from launcher.failures import ConfigError
from launcher.host.kernels import choose_kernel
from launcher.job import Job, tokenizer_path
from launcher.original import check_original
from launcher.progress import open_bar
from launcher.questions import (
    DEMO_TEMPLATE,
    TEMPLATE,
    Form,
    check_template,
    make_questions,
    read_items,
)
from launcher.resolve import DEMO, Resolved, check_effects, check_gpus, resolve
from launcher.schema import Config, EvalSection
from launcher.text import Tokenizer, num_shared, open_tokenizer
from launcher.text_file import read_text
from parallel.checkpoint.open import Checkpoint
from quant.scheme import QuantScheme

# As in GPTQ (Frantar et al., 2022) and after it: the window of most published perplexities.
_LONGEST_DEFAULT_WINDOW = 2048


def make_eval_job(
    config: Config, environment: WorkerEnvironment, *, reads_exam: bool
) -> tuple[Job, tuple[str, ...]]:
    """The job, and what to say about it.

    Args:
        reads_exam: False leaves the text and the questions out, where another rank reads them.

    Raises:
        ConfigError, PromptError and what `resolve` raises: one sentence each.
    """
    resolved = resolve(config, environment)
    check_effects(config)
    original = _check_original(resolved)
    check_gpus(config, resolved, environment)
    context = min(
        item.config.max_position_embeddings for item in (resolved.checkpoint, original) if item
    )
    section = _settle(config.eval, context, is_demo=resolved.checkpoint.path == DEMO)
    config = replace(resolved.config, eval=section)
    if not reads_exam:
        return Job(config, ()), resolved.notes
    exam = _read_exam(config, resolved.checkpoint, context)
    # Last: the first time on a machine it takes seconds, which a refusal should not.
    config, notes = choose_kernel(config, resolved.layout.labels)
    return Job(config, (), exam), resolved.notes + notes


def _check_original(resolved: Resolved) -> Checkpoint | None:
    """The original that is named must run on the same ranks, and there must be what it is of."""
    config = resolved.config
    original = check_original(config, resolved.checkpoint)
    if original is None:
        return None
    if config.quant.scheme() == QuantScheme():
        raise ConfigError(
            "`eval.original` is the original of a quantized model, but nothing is quantized here; "
            "write quant=rtn_a16w8, give a prepared quantized checkpoint, or drop it."
        )
    assert config.parallel.tp is not None
    original.config.check_tp(config.parallel.tp)
    return original


def _settle(section: EvalSection, context: int, *, is_demo: bool) -> EvalSection:
    """Every key of the section with its value."""
    if section.text is None and section.questions is None:
        if not is_demo:
            raise ConfigError(
                "eval needs a text or questions; write eval.text=FILE, eval.questions=FILE.jsonl or "
                "both."
            )
        section = replace(
            section, text=str(DEMO / "held_out.txt"), questions=str(DEMO / "questions.jsonl")
        )
    _check_effects(section)
    window = section.window or min(context, _LONGEST_DEFAULT_WINDOW)
    default = DEMO_TEMPLATE if is_demo else TEMPLATE
    section = replace(
        section,
        window=window,
        stride=section.stride or max(1, window // 2),
        template=default if section.template is None else section.template,
    )
    _check_window(section, context)
    assert section.template is not None
    check_template(section.template)
    return section


def _check_effects(section: EvalSection) -> None:
    """A key of the part that is left out would be ignored, and its user would not know."""
    defaults = EvalSection()
    for part, keys in (
        ("text", ("window", "stride")),
        ("questions", ("max_questions", "template", "choices")),
    ):
        for key in keys if getattr(section, part) is None else ():
            if getattr(section, key) != getattr(defaults, key):
                raise ConfigError(
                    f"`eval.{key}` has no effect without eval.{part}; give that too, or drop it."
                )


def _check_window(section: EvalSection, context: int) -> None:
    assert section.window is not None
    assert section.stride is not None
    if section.window > context:
        raise ConfigError(
            f"`eval.window` must be at most the model's context, {context} tokens, but is "
            f"{section.window}; lower it."
        )
    if section.stride > section.window:
        raise ConfigError(
            f"`eval.stride` must be at most eval.window, {section.window} tokens, but is "
            f"{section.stride}, which would skip tokens; lower it."
        )


def _read_exam(config: Config, checkpoint: Checkpoint, context: int) -> Exam:
    section, tokenizer = config.eval, open_tokenizer(tokenizer_path(config) or checkpoint.path)
    exam = Exam()
    if section.text is not None:
        exam = _with_text(exam, section.text, tokenizer)
    if section.questions is not None:
        exam = _with_questions(exam, section, tokenizer, context)
    highest = max(exam.token_ids)
    if highest >= checkpoint.config.vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {highest}, but vocab_size is "
            f"{checkpoint.config.vocab_size}; use the tokenizer of this checkpoint."
        )
    return exam


def _with_text(exam: Exam, name: str, tokenizer: Tokenizer) -> Exam:
    ids = tokenizer.encode(read_text("eval.text", name))
    num_special = num_shared(ids, tokenizer.encode(""))
    if len(ids) < 2:
        raise ConfigError(
            f"`eval.text` {name} must have at least 2 tokens, but has {len(ids)}; give a longer text."
        )
    return replace(exam, text_ids=tuple(ids), num_special=num_special)


def _with_questions(exam: Exam, section: EvalSection, tokenizer: Tokenizer, context: int) -> Exam:
    assert section.questions is not None
    assert section.template is not None
    items = read_items(section.questions, section.template)
    asked = items[: section.max_questions]
    form = Form(section.template, tuple(section.choices), tokenizer, context)
    with open_bar(
        sys.stderr, total=len(asked), unit="question", desc="tokenizing", leave=False
    ) as bar:
        questions = []
        for question in make_questions(asked, form):
            questions.append(question)
            bar.update()
    return replace(exam, questions=tuple(questions), num_offered=len(items))
