"""What `python -m quant.kernels.survey` found on this machine: kept among the user's caches, or measured
now, once for a processor and versions. Importing this module does not import torch.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from launcher.failures import ConfigError
from launcher.host.topology import allowed_cpus

# In the order in which quant/kernels/choice.py prefers them.
KERNELS = ("native", "onednn", "reference")
_TIMEOUT_S = 60
# The share of a survey's time in which its threads waited for cores that others had. Seen on two cores:
# 0.00 when idle, 0.3 beside two busy loops, 0.5 beside eight.
_MOST_WAITED = 0.2
# A product of one row reads its weights and does little else: seen 0.8 to 1.3 of what memory gives.
_LEAST_SHARE = 0.25
_WIDTHS = {"bfloat16": 2, "float32": 4}
_ATTEMPTS = 2
_ROOT = Path(__file__).parents[2]
# What changes which instructions the libraries use.
_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def survey() -> dict[str, Any]:
    """What works here and how fast: from the cache, or measured now in a child process.

    What is implausible is measured once more, and never kept: the next run tries again.

    Raises:
        ConfigError: the child process failed; leads with its last words.
    """
    path = cache_path()
    if path is None:
        return _measure_plausibly()
    if (kept := _read(path)) is not None:
        return kept
    with _turn(path):
        if (kept := _read(path)) is not None:
            return kept
        found = _measure_plausibly()
        if is_plausible(found):
            _keep(path, found)
        return found


def is_plausible(found: Mapping[str, Any]) -> bool:
    """Whether a survey was made on a machine that was quiet enough to believe its times."""
    rows, columns = found["shape"]
    times = found["unquantized"]
    speeds = [rows * columns * _WIDTHS[name] / 1e6 / times[name]["1"] for name in times]
    return bool(
        found["waited"] <= _MOST_WAITED and max(speeds) >= _LEAST_SHARE * found["read_gb_s"]
    )


def _measure_plausibly() -> dict[str, Any]:
    """The first plausible of a few surveys, or the one that waited least."""
    tried: list[dict[str, Any]] = []
    for _ in range(_ATTEMPTS):
        tried.append(_measure())
        if is_plausible(tried[-1]):
            return tried[-1]
    return min(tried, key=lambda found: float(found["waited"]))


def cache_path() -> Path | None:
    """Where the survey of this processor, these cores and these versions is kept; None: nowhere."""
    key = hashlib.sha256(repr(_identity()).encode()).hexdigest()[:16]
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home
        return None
    return root / "shardrun" / f"kernels-{key}.json"


def _identity() -> list[Any]:
    """All that the answer depends on."""
    native = _ROOT / "quant" / "kernels" / "native"
    kernels = native.parent
    sources = sorted([*native.glob("*.so"), *native.glob("*.py"), *kernels.glob("*.py")])
    return [
        _num_cores(),
        platform.machine(),
        _processor(),
        version("torch"),
        [os.environ.get(name) for name in _VARIABLES],
        [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sources],
    ]


def _num_cores() -> int:
    return len(allowed_cpus())


def _processor() -> list[str]:
    """The model and the instruction sets of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return [platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return [line for line in lines if line.startswith(wanted)]


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Of runs that begin at once one measures, and the others wait for its answer: together they would
    measure each other. Nobody waits longer than a survey may take, or where there are no locks."""
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(path.with_suffix(".lock").open("a"))
        except OSError:
            yield
            return
        deadline = time.monotonic() + _TIMEOUT_S
        while not _is_locked(lock) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield


def _is_locked(file: IO[str]) -> bool:
    """Whether the file is ours now; on a file system without locks it is everybody's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _measure() -> dict[str, Any]:
    # -P: a file of the directory that we are called in must not stand in for a module.
    command = [sys.executable, "-P", "-m", "quant.kernels.survey"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(_num_cores()),
        # Threads that spin while they wait take each other's cores on a busy machine: 47 s for 9,
        # beside four busy loops on two cores.
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
    }
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(_failed(f"it took longer than {_TIMEOUT_S} s")) from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise ConfigError(_failed(last))
    try:
        # The last line: libraries may have said something before.
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise ConfigError(_failed("it printed something else than its answer")) from error
    return found


def _failed(reason: str) -> str:
    return f"the kernels could not be measured ({reason}); write kernel=reference to go without."


def _read(path: Path) -> dict[str, Any] | None:
    """What was kept, or None if there is nothing usable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if _is_survey(found) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _is_survey(found: Any) -> bool:
    """Whether it has the form that quant/kernels/survey.py prints; raises what its walk meets."""
    entries = found["kernels"].values()
    words = [(entry["problem"] or "", entry["detail"]) for entry in entries]
    times = [ms for entry in entries for ms in entry["ms"].values()]
    times += [found["unquantized"]["bfloat16"], *found["unquantized"].values()]
    return (
        set(KERNELS) == set(found["kernels"])
        and type(found["computes_on_gpus"]) is bool
        and found["shape"][0] * found["shape"][1] > 0
        and 0 < found["read_gb_s"] < math.inf
        and is_plausible(found)
        and all(isinstance(word, str) for pair in words for word in pair)
        and all(ms.keys() >= {"1", "128"} for ms in times)
        and all(0 < least < math.inf for ms in times for least in ms.values())
    )


def _keep(path: Path, found: dict[str, Any]) -> None:
    """Write it at once or not at all; a home that cannot be written costs the next run seconds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(found, file)
        os.replace(file.name, path)
    except OSError:
        return
