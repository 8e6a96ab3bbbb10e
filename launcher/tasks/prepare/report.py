"""What a `prepare` that calibrates reports: a table, report.json, and a picture of the errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.job import Job
from launcher.run_dir import RunDir
from launcher.table import print_table
from launcher.tasks.prepare.plot import draw_errors
from parallel.calibration.held_out import Perplexities
from parallel.calibration.result import LayerError
from parallel.checkpoint.conversion import num_bytes
from parallel.checkpoint.layout import Layout
from parallel.checkpoint.source import Source
from parallel.model.placements import linear_modules


@dataclass(frozen=True)
class Report:
    """Everything that is said of a calibration.

    Attributes:
        source: the checkpoint as it was.
        errors: of each decoder layer, of the inputs that it has in the quantized model.
        perplexities: of the held-out texts; None where there are none.
        seconds: of the calibration, without writing.
    """

    layout: Layout
    source: Source
    job: Job
    errors: Sequence[LayerError]
    perplexities: Perplexities | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        texts, section = self.job.texts, self.job.config.calibration
        return {
            "task": "prepare",
            "scheme": self.layout.scheme.to_dict(),
            "label": self.layout.scheme.label,
            "tp": self.job.tp,
            "calibration": {
                "data": section.data,
                "seed": self.job.config.seed,
                "num_samples": len(texts.samples),
                "num_tokens": sum(map(len, texts.samples)),
                "num_texts_in_file": texts.num_offered,
                "num_cut": texts.num_cut,
                "num_passed_over": texts.num_passed_over,
                "max_length": section.max_length,
                "seconds": self.seconds,
            },
            "layers": [
                {"layer": index, "relative_error": error.relative, "cosine": error.cosine}
                for index, error in enumerate(self.errors)
            ],
            "left_out": self.left_out(),
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "perplexity": self._perplexity(),
        }

    @property
    def bytes_before(self) -> int:
        """Of the source; a KV cache's scales are none of it."""
        rows = (row for row in self.layout.table.values() if not row.is_kv_scale)
        return sum(num_bytes(self.source, name) for name in {row.twin or row.name for row in rows})

    @property
    def bytes_after(self) -> int:
        """Of the merged model: what several ranks hold alike counts once."""
        return self.layout.rank_bytes(0, 1)

    def left_out(self) -> dict[str, str]:
        """The linears that stay floats, and why."""
        scheme, modules = self.layout.scheme, linear_modules(self.layout.config)
        named = scheme.left_out(modules) if scheme.quantizes_weights else frozenset()
        return {
            module: _reason(module in named, scheme.quantizes_weights)
            for module in modules
            if f"{module}.weight" not in self.layout.schemes
        }

    def _perplexity(self) -> dict[str, Any] | None:
        found, texts = self.perplexities, self.job.texts
        if found is None:
            return None
        return {
            "held_out": self.job.config.calibration.held_out or "others of calibration.data",
            "num_texts": len(texts.held_out),
            "num_scored_tokens": found.before.num_tokens,
            "before": found.before.perplexity,
            "after": found.after.perplexity,
            "increase_percent": found.increase,
        }


def write_report(report: Report, output: Path, run_dir: RunDir) -> None:
    """The table on stdout, and the files in the run directory."""
    values = report.to_dict()
    run_dir.report.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for sentence in _sentences(values):
        print(sentence)
    print()
    rows = [("layer", "relative error", "cosine")]
    for index, error in enumerate(report.errors):
        rows.append((str(index), f"{error.relative:.5f}", f"{error.cosine:.6f}"))
    print_table(rows)
    print()
    print(f"{output}: tp={report.job.tp}, {values['label']}")
    print(f"report: {run_dir.report}")
    print(draw_errors(report.errors, values["label"], run_dir.path / "errors.png"), flush=True)


def _reason(is_named: bool, quantizes_weights: bool) -> str:
    if not quantizes_weights:
        return "the scheme leaves weights alone"
    return "modules_to_not_convert" if is_named else "layer_policies"


def _sentences(values: Mapping[str, Any]) -> list[str]:
    used, size, quality = values["calibration"], values["bytes"], values["perplexity"]
    found = [
        f"calibrated on {used['num_samples']:,} of {used['num_texts_in_file']:,} texts of "
        f"{used['data']} (seed {used['seed']}): {used['num_tokens']:,} tokens, {used['num_cut']:,} "
        f"texts cut to {used['max_length']}, {used['num_passed_over']:,} too short; "
        f"{used['seconds']:.1f} s",
        f"size: {size['before'] / 1e9:.3g} GB before, {size['after'] / 1e9:.3g} GB after",
    ]
    if values["left_out"]:
        names = ", ".join(f"{name} ({why})" for name, why in sorted(values["left_out"].items()))
        found.append(f"left unquantized: {names}")
    if quality is not None:
        found.append(
            f"perplexity of {quality['num_texts']} held-out texts ({quality['held_out']}; "
            f"{quality['num_scored_tokens']:,} tokens scored): {quality['before']:.4f} before, "
            f"{quality['after']:.4f} after ({quality['increase_percent']:+.3f} %)"
        )
    return found
