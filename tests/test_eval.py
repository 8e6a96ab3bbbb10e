"""eval: perplexity as transformers computes it, answers by summed log-probabilities, the command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from launcher.__main__ import main
from launcher.config import compose
from launcher.exam import Exam, Question
from launcher.questions import Form, Item, check_template, make_questions, read_items
from launcher.ranks.long_text import get_text, set_text
from launcher.resolve import DEMO
from launcher.tasks.eval.result import ModelResult, difference, majority
from launcher.text import num_shared, open_tokenizer
from parallel.checkpoint.open import open_checkpoint
from parallel.errors import NumericsError, PromptError
from parallel.generation.choices import Problem, choice_log_probs
from parallel.generation.loss import Loss
from parallel.generation.perplexity import cut_windows, window_loss
from parallel.generation.score import Run, deal, log_probs
from tests.checkpoints import write_checkpoint
from tests.models import load, logits, run_ranks
from tests.test_bad_inputs import check_refusal
from tests.test_command import COMMAND, run, run_dir

# Of a mean over tokens, between two float32 models that add in another order: a logit of some 10
# differs by up to 1e-5, in either direction, and so does a token's NLL of some 1 to 10.
NLL = {"rel": 1e-5, "abs": 1e-6}
# Of one token's log-probability, for which nothing averages out.
LOG_PROB = {"rtol": 1e-5, "atol": 1e-4}
TOKENS = torch.randint(3, 2048, (150,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


# ------------------------------------------------------------------------------- perplexity


def guide_windows(num_tokens: int, length: int, stride: int):
    """(begin, end, target length) of each window, as Hugging Face's guide has them."""
    previous_end = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + length, num_tokens)
        yield begin, end, end - previous_end
        previous_end = end
        if end == num_tokens:
            break


def guide_loss(model, token_ids: list[int], length: int, stride: int) -> Loss:
    """The guide's loop over transformers' own loss, each window weighted by the labels it scores."""
    losses = []
    for begin, end, target_length in guide_windows(len(token_ids), length, stride):
        input_ids = torch.tensor([token_ids[begin:end]])
        labels = input_ids.clone()
        labels[:, :-target_length] = -100
        count = int((labels[:, 1:] != -100).sum())
        if count:  # transformers' mean over no labels is not a number
            with torch.no_grad():
                losses.append(Loss(model(input_ids, labels=labels).loss.item() * count, count))
    return Loss.total(losses)


def our_loss(path, token_ids, length, stride, size, *, chunk=512, **how) -> Loss:
    checkpoint = open_checkpoint(path)

    def work(group):
        decoder = load(checkpoint, group, length=length, **how)
        cache = decoder.new_cache(1, length)
        windows = cut_windows(len(token_ids), length, stride)
        return Loss.total(window_loss(decoder, cache, token_ids, w, chunk) for w in windows)

    first, *others = run_ranks(size, work)
    assert others == [Loss(0.0, 0)] * (size - 1)
    return first


def reference(path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize(("length", "stride"), [(32, 16), (32, 32), (50, 7), (128, 64), (49, 1)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_perplexity_equals_that_of_transformers(tiny, length, stride, size):
    theirs = guide_loss(reference(tiny), TOKENS, length, stride)
    ours = our_loss(tiny, TOKENS, length, stride, size)
    assert ours.num_tokens == theirs.num_tokens
    assert ours.mean_nll == pytest.approx(theirs.mean_nll, **NLL)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-4)  # e to the NLL of some 8


@pytest.mark.parametrize("size", [1, 2])
def test_perplexity_of_a_trained_model_on_real_text_equals_that_of_transformers(shared, size):
    path = shared / "checkpoints/stories260K/hf"
    text = (shared / "text/wiki.test.raw").read_text()[:3000]
    ids = open_tokenizer(path).encode(text)
    theirs = guide_loss(reference(path), ids, 256, 100)
    ours = our_loss(path, ids, 256, 100, size)
    assert ours.num_tokens == theirs.num_tokens == len(ids) - 1
    assert ours.mean_nll == pytest.approx(theirs.mean_nll, **NLL)


@pytest.mark.parametrize("chunk", [1, 7, 31])
def test_size_of_a_step_does_not_change_the_loss(tiny, chunk):
    whole = our_loss(tiny, TOKENS, 40, 13, 2)
    assert our_loss(tiny, TOKENS, 40, 13, 2, chunk=chunk).mean_nll == pytest.approx(
        whole.mean_nll, **NLL
    )


@pytest.mark.parametrize("num_tokens", [2, 9, 10, 11, 31])
@pytest.mark.parametrize(("length", "stride"), [(10, 10), (10, 3), (10, 9), (2, 1), (2, 2)])
def test_windows_are_those_of_the_guide(num_tokens, length, stride):
    windows = list(cut_windows(num_tokens, length, stride))
    expected = [
        (begin, end, max(end - target_length, begin + 1))
        for begin, end, target_length in guide_windows(num_tokens, length, stride)
    ]
    found = [(window.start, window.stop, window.first) for window in windows]
    assert found == [window for window in expected if window[2] < window[1]]


def test_overlapping_windows_score_every_token_but_the_first_once():
    scored = [at for w in cut_windows(100, 10, 4) for at in range(w.first, w.stop)]
    assert scored == list(range(1, 100))


def test_infinite_perplexity_is_said_so():
    assert Loss(1e6, 10).perplexity == float("inf")


# ------------------------------------------------------------------------- log-probabilities


def test_log_probabilities_in_blocks_equal_those_at_once(monkeypatch):
    found = torch.randn(11, 50, generator=torch.Generator().manual_seed(0)) * 20
    ids = list(range(11))
    expected = found.double().log_softmax(-1)[range(11), ids]
    monkeypatch.setattr("parallel.generation.score._BLOCK_VALUES", 120)  # two rows and a part
    # float64 all the way: nothing but its own rounding.
    torch.testing.assert_close(log_probs(found, ids), expected, rtol=1e-12, atol=1e-12)


def test_log_probability_that_is_no_number_is_an_error():
    with pytest.raises(NumericsError, match="damaged"):
        log_probs(torch.full((2, 5), float("nan")), [0, 1])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_dealt_steps_hold_every_token_once_and_no_more_than_asked_for(size):
    runs = [Run(0, 0, range(5), 2), Run(1, 3, range(10, 11), 1), Run(2, 0, range(20, 29), 4)]
    steps = list(deal(runs, size))
    assert all(0 < sum(len(run.token_ids) for run in step) <= size for step in steps)
    parts = [run for step in steps for run in step]
    for whole in runs:
        mine = [part for part in parts if part.row == whole.row]
        assert [at for part in mine for at in part.token_ids] == list(whole.token_ids)
        offsets = [part.token_ids[0] - whole.token_ids[0] for part in mine]
        assert [part.start - whole.start for part in mine] == offsets
        scored = [at for part in mine for at in list(part.token_ids)[::-1][: part.num_scored]]
        assert sorted(scored) == list(whole.token_ids)[-whole.num_scored :]


PROBLEMS = [
    Problem((1, 5, 6, 7), ((8,), (9,))),
    Problem((1, 40, 41, 42, 43, 44, 45, 46), ((50, 51), (52,))),
    Problem((1,), ((60, 61, 62), (60, 63))),
    Problem((1, 70, 71), ((72,), (73, 74, 75, 76))),
]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("chunk", [3, 512])
def test_continuations_of_several_tokens_are_summed_each_after_the_ones_before(tiny, size, chunk):
    checkpoint = open_checkpoint(tiny)

    def work(group):
        decoder = load(checkpoint, group)
        cache = decoder.new_cache(len(PROBLEMS), max(problem.length for problem in PROBLEMS))
        return choice_log_probs(decoder, cache, PROBLEMS, chunk)

    found, *others = run_ranks(size, work)
    assert others == [None] * (size - 1)
    expected = [[sequence_log_prob(tiny, p.prompt_ids, c) for c in p.choices] for p in PROBLEMS]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **LOG_PROB)


def sequence_log_prob(path, prompt_ids, choice_ids) -> float:
    """Of a continuation, from the logits of the whole sequence computed by itself."""
    rows = logits(path, [*prompt_ids, *choice_ids], 1).double().log_softmax(-1)
    return sum(float(rows[len(prompt_ids) - 1 + at, token]) for at, token in enumerate(choice_ids))


@pytest.mark.parametrize("size", [1, 2])
def test_answers_to_real_questions_are_those_of_transformers(shared, size):
    path = shared / "checkpoints/stories260K/hf"
    items = read_items(str(shared / "boolq/dev.jsonl"), TEMPLATE)[:12]
    form = Form(TEMPLATE, (" yes", " no"), open_tokenizer(path), 512)
    asked = list(make_questions(items, form))
    problems = [Problem(item.prompt_ids, item.choice_ids) for item in asked]
    assert max(len(choice) for problem in problems for choice in problem.choices) > 1

    def work(group):
        decoder = load(open_checkpoint(path), group, length=512)
        cache = decoder.new_cache(len(problems), 512)
        return choice_log_probs(decoder, cache, problems, 512)

    model = reference(path)
    expected = [[their_log_prob(model, p.prompt_ids, c) for c in p.choices] for p in problems]
    found = run_ranks(size, work)[0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **LOG_PROB)


def their_log_prob(model, prompt_ids, choice_ids) -> float:
    """Of a continuation: transformers' mean loss over its labels, times their number."""
    input_ids = torch.tensor([[*prompt_ids, *choice_ids]])
    labels = input_ids.clone()
    labels[:, : len(prompt_ids)] = -100
    with torch.no_grad():
        return -model(input_ids, labels=labels).loss.item() * len(choice_ids)


# --------------------------------------------------------------------------------- questions


class Words:
    """A tokenizer of words and spaces that joins a word to a full stop before it: ids are texts."""

    def __init__(self, *joined: str) -> None:
        self.joined = joined

    def encode(self, text: str) -> list:
        pieces, at = ["<s>"], 0
        while at < len(text):
            piece = next((join for join in self.joined if text.startswith(join, at)), text[at])
            pieces.append(piece)
            at += len(piece)
        return pieces


ITEM = Item(1, "is it red", "The ball is red. It is round. It is mine.", True)
TEMPLATE = "{passage} Q: {question}? A:"


def ask(tokenizer, context=1000, choices=(" yes", " no"), template=TEMPLATE, item=ITEM) -> Question:
    (question,) = make_questions([item], Form(template, choices, tokenizer, context))
    return question


def test_continuation_is_what_its_tokens_are_beyond_the_prompt():
    question = ask(Words())
    assert "".join(question.prompt_ids[1:]) == TEMPLATE.format(
        question=ITEM.question, passage=ITEM.passage
    )
    assert question.choice_ids == (tuple(" yes"), tuple(" no"))
    assert (question.num_cut, question.is_merged) == (0, False)


def test_token_over_the_boundary_belongs_to_its_continuation():
    question = ask(Words("A: no"))
    assert question.is_merged
    assert question.prompt_ids[-1] == " "
    # The same characters are scored in both: the prompt's `A:` is in the one's sum as in the other's.
    assert ["".join(choice) for choice in question.choice_ids] == ["A: yes", "A: no"]


def test_boundary_of_sentencepiece_is_found_where_it_strips_a_space():
    tokenizer = open_tokenizer(DEMO)
    question = ask(tokenizer)
    prompt = tokenizer.encode(TEMPLATE.format(question=ITEM.question, passage=ITEM.passage))
    assert list(question.prompt_ids) == prompt
    assert [len(choice) for choice in question.choice_ids] == [1, 1]
    assert tokenizer.decode([*prompt, *question.choice_ids[0]]).endswith("A: yes")


@pytest.mark.parametrize("context", [22, 25, 40, 62])
def test_passage_is_cut_as_little_as_the_context_needs_and_the_question_kept(context):
    question = ask(Words(), context)
    longest = max(map(len, question.choice_ids))
    assert len(question.prompt_ids) + longest == context  # of single characters, all room is used
    kept = len(ITEM.passage) - question.num_cut
    assert "".join(question.prompt_ids[1:]) == f"{ITEM.passage[:kept]} Q: is it red? A:"


def test_passage_that_fits_exactly_is_whole():
    whole = len(ask(Words()).prompt_ids) + len(" yes")
    assert ask(Words(), whole).num_cut == 0
    assert ask(Words(), whole - 1).num_cut == 1


def test_question_that_does_not_fit_without_its_passage_is_refused():
    with pytest.raises(PromptError, match=r"line 1 has 22 tokens .* context is 21"):
        ask(Words(), 21)


def test_continuations_that_are_the_same_tokens_are_refused():
    with pytest.raises(PromptError, match=r"eval\.choices"):
        ask(SimpleNamespace(encode=lambda text: text.split()), choices=(" ", "  "))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{passage} {title} {question}", "{title}"),
        ("{passage}", "{question}"),
        ("{question!r}", "conversion"),
        ("{question:>9}", "conversion"),
        ("{question.x}", "{question.x}"),
        ("{} {question}", "{}"),
        ("{question", "brace"),
    ],
)
def test_template_of_another_form_is_refused(template, words):
    with pytest.raises(ValueError, match=r"^`eval.template`") as caught:
        check_template(template)
    assert words in str(caught.value)


def test_template_of_null_is_the_default():
    assert compose(["eval.template=null"]).eval.template is None


def test_template_may_hold_braces_and_leave_the_passage_out():
    check_template("{{{question}}}")
    question = ask(
        Words(), template="{{{question}}}", item=replace(ITEM, passage="", question="{x}")
    )
    assert "".join(question.prompt_ids[1:]) == "{{x}}"


def test_common_beginning_is_counted():
    assert num_shared([1, 2, 3], [1, 2], [1, 2, 9]) == 2
    assert num_shared([1], []) == 0


def test_exam_survives_being_written():
    exam = Exam((1, 2, 3), 1, (ask_ids(0, True), ask_ids(1, False)), 5)
    assert Exam.from_dicts([json.loads(json.dumps(entry)) for entry in exam.to_dicts()]) == exam


def ask_ids(index: int, answer: bool) -> Question:
    return Question(index, "q", answer, (1, 2), ((3,), (4, 5)), 0, False)


def test_long_exam_passes_through_the_store_in_pieces():
    """torch's server takes 8 MB of a value at most: 2 million tokens are more."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for text in ("", "é" * 3, json.dumps(list(range(2_000_000)))):
        set_text(store, "job/prompts", text)
        assert get_text(store, "job/prompts") == text


# -------------------------------------------------------------------------------- arithmetic


def result(name: str, nll: float, *log_probs: tuple[float, float]) -> ModelResult:
    return ModelResult(name, "", name, "float32", Loss(nll * 10, 10), log_probs, {})


def test_difference_counts_flips_both_ways():
    questions = [ask_ids(0, True), ask_ids(1, True), ask_ids(2, False), ask_ids(3, False)]
    original = result("original", 2.0, (-1, -2), (-1, -2), (-1, -2), (-2, -1))
    quantized = result("w8a16", 2.01, (-2, -1), (-1, -2), (-2, -1), (-2, -1))
    assert original.to_dict(questions)["questions"]["accuracy"] == 0.75
    found = difference(original, quantized, questions)
    assert (found.num_flipped, found.num_lost, found.accuracy_points) == (2, 1, 0.0)
    assert found.perplexity_increase == pytest.approx(100 * (2.71828182845904**0.01 - 1))
    assert majority(questions[:3]) == (True, 2 / 3)


# -------------------------------------------------------------------------------- the command


QUICK = ("eval.max_questions=24", "eval.window=128", "eval.stride=64", "dtype=float32")


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory):
    """A short text and the questions of the demo model, and a question whose passage must be cut."""
    folder = tmp_path_factory.mktemp("files")
    text = (DEMO / "held_out.txt").read_text()[:2500]
    (folder / "text.txt").write_text(text)
    lines = (DEMO / "questions.jsonl").read_text().splitlines()[:23]
    long = {"question": "is it red", "answer": True, "passage": "The ball is red. " * 200}
    (folder / "questions.jsonl").write_text("\n".join([json.dumps(long), "", *lines, lines[0]]))
    return f"eval.text={folder / 'text.txt'}", f"eval.questions={folder / 'questions.jsonl'}"


@pytest.fixture(scope="module")
def reports(tmp_path_factory, demo_files):
    """(stdout, report, answers) of original and w8a16 at tp 1, and at tp 2 under torchrun."""
    found = []
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "launcher",
    ]
    for command, more in ((COMMAND, ("parallel.tp=1",)), (torchrun, ())):
        folder = tmp_path_factory.mktemp("run")
        words = ("task=eval", "quant=rtn_a16w8", *QUICK, *demo_files, *more)
        done = run(folder, *words, command=command)
        assert done.returncode == 0, done.stderr
        report = json.loads((run_dir(folder) / "report.json").read_text())
        lines = (run_dir(folder) / "result.jsonl").read_text().splitlines()
        found.append((done.stdout, report, [json.loads(line) for line in lines]))
    return found


def test_perplexity_and_answers_are_the_same_at_every_tp(reports):
    (_, one, answers_of_one), (_, two, answers_of_two) = reports
    assert (one["tp"], two["tp"]) == (1, 2)
    assert one["protocol"] == two["protocol"]
    for here, there in zip(one["models"], two["models"], strict=True):
        assert here["perplexity"]["num_tokens"] == there["perplexity"]["num_tokens"]
        assert here["perplexity"]["mean_nll"] == pytest.approx(
            there["perplexity"]["mean_nll"], **NLL
        )
        assert here["questions"] == there["questions"]
    for here, there in zip(answers_of_one, answers_of_two, strict=True):
        for name in ("original", "w8a16"):
            sums = [torch.tensor(item["models"][name]["log_probs"]) for item in (here, there)]
            torch.testing.assert_close(*sums, **LOG_PROB)


def test_report_states_the_protocol_and_what_was_cut(reports):
    protocol = reports[0][1]["protocol"]
    text = protocol["perplexity"]
    assert (text["window"], text["stride"], text["special_ids"]) == (128, 64, [1])
    assert text["num_scored_tokens"] == text["num_text_tokens"] - 1
    questions = protocol["questions"]
    assert (questions["num_questions"], questions["num_in_file"]) == (24, 25)
    assert questions["num_passages_cut"] == 1
    assert reports[0][2][0]["cut_characters"] > 1000


def test_table_says_how_it_was_measured_and_compares(reports):
    out = reports[0][0]
    for words in (
        "windows of 128 tokens every 64", "BOS (token 1) once", "24 of 25 questions",
        "1 passages cut", "original  float32", "w8a16     float32", " %", "points",
    ):  # fmt: skip
        assert words in out


def test_report_gives_what_quantization_did(reports):
    original, quantized = (model for model in reports[0][1]["models"])
    (found,) = reports[0][1]["differences"]
    ratio = quantized["perplexity"]["perplexity"] / original["perplexity"]["perplexity"]
    assert found["perplexity_increase"] == pytest.approx(100 * (ratio - 1), abs=1e-6)
    assert 0 < abs(found["perplexity_increase"]) < 1  # int8 weights per channel: small, and seen
    flips = [
        line["models"]["original"]["answer"] != line["models"]["w8a16"]["answer"]
        for line in reports[0][2]
    ]
    assert found["num_flipped"] == sum(flips)


def test_prepared_checkpoint_is_compared_with_the_original_that_is_named(
    tmp_path, demo_files, reports
):
    words = ("quant=rtn_a16w8", "parallel.tp=2", "output=w8")
    assert run(tmp_path, "prepare", *words).returncode == 0
    # The demo's own prompt is the default of the embedded model alone.
    template = "eval.template=Passage: {passage} Question: {question}? Answer:"
    done = run(
        tmp_path, "eval", "checkpoint=w8", f"eval.original={DEMO}", template, *QUICK, *demo_files
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((run_dir(tmp_path) / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["original", "w8a16"]
    assert report["models"][0]["checkpoint"] == str(DEMO)
    expected = reports[1][1]["differences"][0]
    assert report["differences"][0]["perplexity_increase"] == pytest.approx(
        expected["perplexity_increase"], abs=1e-3
    )


def test_demo_model_brings_its_own_text_and_questions(tmp_path):
    done = run(
        tmp_path,
        "eval",
        "eval.max_questions=300",
        "eval.window=512",
        "eval.stride=512",
        "dtype=float32",
    )
    assert done.returncode == 0, done.stderr
    (model,) = json.loads((run_dir(tmp_path) / "report.json").read_text())["models"]
    # launcher/demo/README.md has both, the perplexity with a BOS at the head of each window.
    assert model["questions"]["accuracy"] == pytest.approx(0.813, abs=0.004)
    assert model["perplexity"]["perplexity"] == pytest.approx(2.1241, rel=0.03)


# ------------------------------------------------------------------------------------ refusals


GOOD = '{"question": "is it", "passage": "It is.", "answer": true}\n'
FILES = {
    "text.txt": "The dog sleeps.",
    "empty.txt": "",
    "good.jsonl": GOOD,
    "empty.jsonl": "\n\n",
    "broken.jsonl": GOOD + "\n{",
    "list.jsonl": "[1]",
    "unanswered.jsonl": GOOD + GOOD + '{"question": "is it", "passage": "It is."}',
    "words.jsonl": GOOD + '{"question": "is it", "passage": "It is.", "answer": "yes"}',
    "number.jsonl": '{"question": 1, "passage": "It is.", "answer": true}',
    "half.jsonl": '{"question": "\\ud800", "passage": "It is.", "answer": true}',
    "long.jsonl": json.dumps({"question": "is it " * 200, "passage": "", "answer": True}),
}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), ("eval.text=FILE", "eval.questions=FILE.jsonl")),
        (("eval.text=@/none.txt",), ("`eval.text`", "none.txt", "No such file")),
        (("eval.text=@/empty.txt",), ("`eval.text`", "at least 2 tokens", "has 1")),
        (("eval.text=@/text.txt", "eval.window=129"), ("`eval.window`", "128", "129")),
        (("eval.text=@/text.txt", "eval.window=1"), ("`eval.window`", "at least 2")),
        (("eval.text=@/text.txt", "eval.window=9", "eval.stride=10"), ("`eval.stride`", "9", "10")),
        (("eval.text=@/text.txt", "eval.template={question}"), ("`eval.template`", "no effect")),
        (("eval.questions=@/good.jsonl", "eval.window=9"), ("`eval.window`", "no effect")),
        (("eval.questions=@/empty.jsonl",), ("`eval.questions`", "no question")),
        (("eval.questions=@/broken.jsonl",), ("broken.jsonl, line 3,", "'{'")),
        (("eval.questions=@/list.jsonl",), ("list.jsonl, line 1,", "JSON object")),
        (("eval.questions=@/unanswered.jsonl",), ("line 3: `answer`", "missing")),
        (("eval.questions=@/words.jsonl",), ("line 2: `answer`", "true or false", "'yes'")),
        (("eval.questions=@/number.jsonl",), ("line 1: `question`", "a string")),
        (("eval.questions=@/half.jsonl",), ("line 1: `question`", "surrogate")),
        (("eval.questions=@/long.jsonl",), ("line 1", "without its passage", "context is 128")),
        (("eval.questions=@/good.jsonl", "eval.template={x}"), ("`eval.template`", "{x}")),
        (("eval.questions=@/good.jsonl", "eval.choices=[a,a]"), ("`eval.choices`", "different")),
        (("eval.questions=@/good.jsonl", "eval.choices=[a]"), ("`eval.choices`", "two different")),
        (("eval.text=@/text.txt", "eval.original=/no/such"), ("`eval.original`", "/no/such")),
        (("eval.text=@/text.txt", "eval.original=%"), ("`eval.original`", "nothing is quantized")),
        (("eval.text=@/text.txt", "prompt=a"), ("`prompt`", "no effect on eval")),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_starts(
    tiny, tmp_path, monkeypatch, capsys, words, says
):
    monkeypatch.setattr("launcher.ranks.workers.preload_torch", pytest.fail)
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    typed = [word.replace("@", str(tmp_path)).replace("%", str(tiny)) for word in words]
    status = main(["eval", f"checkpoint={tiny}", *typed])
    check_refusal(status, *capsys.readouterr(), says)
    assert not (tmp_path / "outputs").exists()
