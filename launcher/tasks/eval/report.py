"""What `eval` leaves: the table, report.json for machines, and result.jsonl of the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from launcher.exam import Exam, Question
from launcher.job import Job
from launcher.ranks.rank import Rank
from launcher.tasks.eval.result import Difference, ModelResult, difference, majority
from launcher.tasks.eval.table import num_cut, print_result, special_words


def write_result(rank: Rank, results: Sequence[ModelResult]) -> None:
    """A table on stdout, report.json, and result.jsonl of the answers; the first is the original."""
    exam, section = rank.job.exam, rank.job.config.eval
    changes: list[Difference | None] = [None]
    changes += [difference(results[0], result, exam.questions) for result in results[1:]]
    print_result(section, exam, results, changes)
    report = {
        "task": "eval",
        "tp": rank.group.size,
        "device": rank.device.type,
        "protocol": _protocol(rank.job, results[0]),
        "models": [result.to_dict(exam.questions) for result in results],
        "differences": [asdict(change) for change in changes if change is not None],
    }
    rank.run_dir.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"report: {rank.run_dir.report}", flush=True)
    if exam.questions:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in _answers(exam, results))
        rank.run_dir.result.write_text("".join(lines), encoding="utf-8")


def _protocol(job: Job, first: ModelResult) -> dict[str, object]:
    """All that another program would need to measure the same."""
    exam, section = job.exam, job.config.eval
    found: dict[str, object] = {}
    if first.loss is not None:
        found["perplexity"] = {
            "text": section.text,
            "window": section.window,
            "stride": section.stride,
            "num_text_tokens": len(exam.text_ids),
            "num_scored_tokens": first.loss.num_tokens,
            "bos": special_words(exam),
            "special_ids": list(exam.text_ids[: exam.num_special]),
        }
    if exam.questions:
        answer, share = majority(exam.questions)
        found["questions"] = {
            "file": section.questions,
            "template": section.template,
            "choices": section.choices,
            "num_questions": len(exam.questions),
            "num_in_file": exam.num_offered,
            "num_passages_cut": num_cut(exam),
            "num_merged_boundaries": sum(item.is_merged for item in exam.questions),
            "majority_answer": answer,
            "majority_share": share,
        }
    return found


def _answers(exam: Exam, results: Sequence[ModelResult]) -> Iterator[dict[str, object]]:
    """The lines of result.jsonl."""
    for index, question in enumerate(exam.questions):
        yield {**_facts(question), "models": {
            result.name: {
                "answer": result.answers[index],
                "log_probs": list(result.choice_log_probs[index]),
            }
            for result in results
        }}  # fmt: skip


def _facts(question: Question) -> dict[str, object]:
    return {
        "index": question.index,
        "question": question.text,
        "answer": question.answer,
        "prompt_tokens": len(question.prompt_ids),
        "choice_tokens": list(map(len, question.choice_ids)),
        "cut_characters": question.num_cut,
    }
