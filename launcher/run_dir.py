"""RunDir: every path of one run."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.failures import ConfigError, ErrorRecord
from launcher.job import Job


@dataclass(frozen=True)
class RunDir:
    """`outputs/<date>/<time>-<task>-<id>/`, made for one run and never shared."""

    path: Path

    @classmethod
    def create(cls, job: Job) -> RunDir:
        """Make the directory and write what the workers read.

        Raises:
            ConfigError: it cannot be made.
        """
        day, clock = time.strftime("%Y-%m-%d"), time.strftime("%H-%M-%S")
        name = f"{clock}-{job.config.task.name}-{secrets.token_hex(3)}"
        path = (Path(job.config.run_root) / day / name).absolute()
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(
                f"`run_root` {job.config.run_root} cannot be written ({error.strerror}); "
                "choose another."
            ) from error
        return cls(path)._write(job)

    def part(self, name: str, job: Job) -> RunDir:
        """A directory inside this one, for one of several jobs that belong together."""
        (self.path / name).mkdir()
        return RunDir(self.path / name)._write(job)

    def _write(self, job: Job) -> RunDir:
        self.config.write_text(job.config_text(), encoding="utf-8")
        self.prompts.write_text(job.prompts_text(), encoding="utf-8")
        return self

    @property
    def config(self) -> Path:
        return self.path / "run.yaml"

    @property
    def prompts(self) -> Path:
        return self.path / "prompts.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "decode.png"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    def log(self, rank: int) -> Path:
        return self.path / f"rank_{rank}.log"

    def error(self, rank: int) -> Path:
        return self.path / f"rank_{rank}.error.json"

    def errors(self) -> list[ErrorRecord]:
        return [ErrorRecord.read(path) for path in sorted(self.path.glob("rank_*.error.json"))]

    def job_hash(self) -> str:
        """sha256 of what the workers read."""
        return hashlib.sha256(self.config.read_bytes() + self.prompts.read_bytes()).hexdigest()

    def read_job(self, expected_hash: str) -> Job:
        """Read the job; raises ConfigError if the files are not those that the launcher wrote."""
        if self.job_hash() != expected_hash:
            raise ConfigError(f"{self.config} changed after the run was started; start it again.")
        return Job.from_texts(
            self.config.read_text(encoding="utf-8"), self.prompts.read_text(encoding="utf-8")
        )
