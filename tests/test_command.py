"""The command itself, as its users start it: plain, under torchrun, with hand-set `MS_*`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "launcher"]
ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "launcher" / "demo"
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> tuple[str, ...]:
    """The words of a run that no processor ends before a test's signal comes: minutes of decoding."""
    folder = tmp_path_factory.mktemp("endless")
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    tokens = 60_000
    (folder / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": tokens + 100})
    )
    words = (f"generation.max_new_tokens={tokens}", "generation.ignore_eos=true")
    return (f"checkpoint={folder}", "parallel.tp=2", "prompt=The code of room", *words)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def start(
    folder: Path,
    *arguments: str,
    command=COMMAND,
    stdin=None,
    process_group=None,
    **variables: str,
) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, *arguments],
        cwd=folder,
        stdin=stdin,
        process_group=process_group,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str, **how) -> subprocess.CompletedProcess:
    with start(folder, *arguments, **how) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def launch():
    """`start`, with an end to every process and pipe whatever the test finds."""
    started = []

    def start_and_keep(*arguments, **how):
        started.append(start(*arguments, **how))
        return started[-1]

    yield start_and_keep
    for process in started:
        process.kill()
        with process:  # closes its pipes and waits for it
            pass


def run_dir(folder: Path) -> Path:
    (found,) = folder.glob("outputs/*/*")
    return found


def results(folder: Path) -> list[dict]:
    text = (run_dir(folder) / "result.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def agent_of(pid: int) -> int:
    """Pid of the agent: grandchild of the launcher, child of its forkserver."""
    (agent,) = [pid for child in children_of(pid) for pid in children_of(child)]
    return agent


def workers_of(pid: int) -> list[int]:
    """Pids of the ranks: children of the launcher's agent, whose first child hosts the store."""
    return children_of(agent_of(pid))[1:]


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return sorted(map(int, path.read_text().split()))


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while not all(map(is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(map(is_gone, pids))


def wait_for_text(process: subprocess.Popen) -> str:
    """Block until a first piece of the answer has come: the ranks are in the decode loop then."""
    return process.stdout.read(60)


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """`shardrun` without arguments."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(folder)


def test_no_arguments_generate_from_the_demo_with_two_ranks(plain):
    folder, done = plain
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("'text_generation_text': [") for line in lines)
    prompts = ["I love Beijing, because", "LLaMA is a", "Huawei is a company that"]
    assert all(f"[{prompt}" in line for prompt, line in zip(prompts, lines, strict=True))
    assert [entry["prompt"] for entry in results(folder)] == prompts
    report = json.loads((run_dir(folder) / "report.json").read_text())
    assert report["tp"] == 2
    assert report["prefill_tokens"] > 0
    assert report["decode_tokens_per_s"] > 0


def test_run_directory_holds_what_a_run_leaves(plain):
    folder, _ = plain
    names = {path.name for path in run_dir(folder).iterdir()}
    assert names == {
        "run.yaml", "prompts.jsonl", "result.jsonl", "report.json", "rank_0.log", "rank_1.log",
    }  # fmt: skip
    keys = {"index", "id", "prompt", "text", "token_ids", "finish_reason"}
    assert all(entry.keys() == keys for entry in results(folder))


def test_run_yaml_starts_the_same_run_again(plain, tmp_path):
    folder, _ = plain
    done = run(tmp_path, "generate", f"config={run_dir(folder) / 'run.yaml'}")
    assert done.returncode == 0, done.stderr
    assert sorted(results(tmp_path), key=str) == sorted(results(folder), key=str)


def test_torchrun_gives_the_same_text_printed_once(plain, tmp_path):
    folder, _ = plain
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", "-m", "launcher"]  # fmt: skip
    done = run(tmp_path, "task=generate", command=torchrun)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(plain[1].stdout.splitlines())
    assert sorted(results(tmp_path), key=str) == sorted(results(folder), key=str)


def start_mindspore(launch, folder: Path, size: int, *arguments: str, with_rank_id: bool = True):
    """A scheduler and its workers, each with hand-set variables; returns them in that order."""
    shared = {
        "MS_WORKER_NUM": str(size), "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": str(free_port()), "MS_TOPO_TIMEOUT": "60",
    }  # fmt: skip
    scheduler = launch(folder, *arguments, MS_ROLE="MS_SCHED", RANK_ID="0", **shared)
    ranks = ({"RANK_ID": str(rank)} if with_rank_id else {} for rank in range(size))
    return [
        scheduler,
        *(launch(folder, *arguments, MS_ROLE="MS_WORKER", **shared, **rank) for rank in ranks),
    ]


@pytest.mark.parametrize("with_rank_id", [True, False], ids=["RANK_ID", "ranks handed out"])
def test_hand_set_mindspore_variables_give_the_same_text(plain, launch, tmp_path, with_rank_id):
    processes = start_mindspore(launch, tmp_path, 2, "task=generate", with_rank_id=with_rank_id)
    ended = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ended
    printed = "".join(out for out, _ in ended)
    assert sorted(printed.splitlines()) == sorted(plain[1].stdout.splitlines())


def test_prompts_of_a_stdin_that_all_ranks_share_are_read_once(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", "-m", "launcher"]  # fmt: skip
    (tmp_path / "prompts.txt").write_text("The dog\nThe cat\n")
    with (tmp_path / "prompts.txt").open() as stdin:
        done = run(tmp_path, "task=generate", "prompts_file=-", command=torchrun, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert sorted(entry["prompt"] for entry in results(tmp_path)) == ["The cat", "The dog"]


def test_prepare_then_generate_on_any_number_of_ranks(tmp_path):
    done = run(tmp_path, "prepare", "quant=rtn_a16w8", "parallel.tp=2", "output=w8")
    assert done.returncode == 0, done.stderr
    texts = []
    for folder, more in (("a", ()), ("b", ("parallel.tp=1",))):
        (tmp_path / folder).mkdir()
        arguments = ("checkpoint=../w8", "dtype=float32", "prompt=The code of", *more)
        done = run(tmp_path / folder, "generate", *arguments)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1]


def test_verify_compares_with_one_rank_and_with_the_original(tmp_path):
    done = run(tmp_path, "verify", "quant=rtn_a16w8", "dtype=float32", "parallel.tp=2")
    assert done.returncode == 0, done.stderr
    single, original = json.loads((run_dir(tmp_path) / "report.json").read_text())["comparisons"]
    assert single["equal_answers"] == single["num_prompts"] == 3
    assert single["max_logit_delta"] < 1e-3
    assert 1e-3 < original["max_logit_delta"] < 5


def test_worker_request_of_mindspore_starts_so_many_ranks_and_says_so(tmp_path):
    done = run(tmp_path, "prompt=The dog", MS_WORKER_NUM="4")
    assert done.returncode == 0, done.stderr
    assert "MS_WORKER_NUM=4 is set: starting as many ranks" in done.stderr
    assert json.loads((run_dir(tmp_path) / "report.json").read_text())["tp"] == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_worker_is_named_and_nothing_is_left(launch, endless, tmp_path, rank):
    segments = set(os.listdir("/dev/shm"))
    process = launch(tmp_path, *endless)
    wait_for_text(process)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[rank], signal.SIGKILL)
    killed_at = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - killed_at < 10
    assert process.returncode == 1
    assert "was ended by signal 9 (SIGKILL)" in err.splitlines()[0]
    assert f"(pid {workers[rank]})" in err.splitlines()[0]
    assert all(is_gone(pid) for pid in workers)
    assert set(os.listdir("/dev/shm")) <= segments


def test_worker_that_is_missing_is_said_without_a_terminal(launch, tmp_path):
    scheduler, first, second = start_mindspore(launch, tmp_path, 2, "task=generate")
    second.kill()  # long before it has imported torch
    for who, process in (("the scheduler", scheduler), ("rank 0", first)):
        line = process.stderr.readline()
        assert line.startswith(f"shardrun: {who} waits for rank 1 of 2 to arrive, until "), line
        assert line.endswith(" (MS_TOPO_TIMEOUT=60)\n")


def test_survivors_of_hand_set_variables_notice_by_themselves(launch, endless, tmp_path):
    processes = start_mindspore(launch, tmp_path, 2, "task=generate", *endless)
    wait_for_text(processes[1])
    os.kill(processes[2].pid, signal.SIGKILL)
    killed_at = time.monotonic()
    ended = [process.communicate(timeout=30) for process in processes]
    assert time.monotonic() - killed_at < 10
    assert [process.returncode for process in processes] == [1, 1, -signal.SIGKILL]
    assert f"rank 1 (host {socket.gethostname()}, pid {processes[2].pid})" in ended[1][1]


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_to_the_launcher_ends_the_ranks(launch, endless, tmp_path, sent, status):
    process = launch(tmp_path, *endless)
    wait_for_text(process)
    workers = workers_of(process.pid)
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert all(is_gone(pid) for pid in workers)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_to_every_process_of_a_run_ends_it_as_one_to_the_launcher(
    launch, endless, tmp_path, sent, status
):
    """Ctrl-C in a terminal, scancel: who supervises must not be shot at while it stops the ranks."""
    process = launch(tmp_path, *endless, process_group=0)
    wait_for_text(process)
    agent, workers = agent_of(process.pid), workers_of(process.pid)
    os.killpg(process.pid, sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert err == ""
    wait_until_gone([agent, *workers])


def test_signal_while_torch_is_imported_leaves_nobody(launch, endless, tmp_path):
    process = launch(tmp_path, *endless)
    while not list(tmp_path.glob("outputs/*/*/run.yaml")) and process.poll() is None:
        time.sleep(0.01)
    servers = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == ""
    wait_until_gone(servers)


def test_killed_launcher_takes_its_ranks_along(launch, endless, tmp_path):
    """It can stop nobody any more: the agent sees for itself that it is gone."""
    process = launch(tmp_path, *endless)
    wait_for_text(process)
    agent, workers = agent_of(process.pid), workers_of(process.pid)
    assert len(workers) == 2
    store = children_of(agent)[0]
    process.kill()
    process.wait(timeout=10)
    wait_until_gone([*workers, agent, store])


def test_killed_agent_is_named_and_takes_its_ranks_along(launch, endless, tmp_path):
    segments = set(os.listdir("/dev/shm"))
    process = launch(tmp_path, *endless)
    wait_for_text(process)
    agent, workers = agent_of(process.pid), workers_of(process.pid)
    os.kill(agent, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    says = f"the agent of the ranks (pid {agent}) was ended by signal 9 (SIGKILL)"
    assert says in err.splitlines()[0]
    wait_until_gone(workers)
    assert set(os.listdir("/dev/shm")) <= segments


def test_stopped_rank_is_killed_with_the_run(launch, endless, tmp_path):
    """SIGTERM waits for a process that is stopped; we do not."""
    process = launch(tmp_path, *endless)
    wait_for_text(process)
    workers = workers_of(process.pid)
    os.kill(workers[1], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert all(is_gone(pid) for pid in workers)


def test_terminated_prepare_says_what_it_left_and_is_gone_on_with(launch, tmp_path):
    from tests.checkpoints import write_checkpoint

    write_checkpoint(tmp_path / "source", hidden_size=1024, intermediate_size=4096, num_hidden_layers=10,
                     num_attention_heads=8, num_key_value_heads=8)  # fmt: skip
    before = set(os.listdir(tmp_path))
    arguments = ("prepare", "checkpoint=source", "quant=rtn_a16w8", "output=out")
    process = launch(tmp_path, *arguments)
    while process.poll() is None and not list(tmp_path.glob(".out.partial/journal_*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (143, 0)
    if process.returncode == 143:
        assert set(os.listdir(tmp_path)) - before == {".out.partial"}
        assert "the same command goes on from there" in err
        assert launch(tmp_path, *arguments).wait(timeout=60) == 0
    assert set(os.listdir(tmp_path)) - before == {"out"}


def test_four_runs_at_once_do_not_meet(plain, launch, tmp_path):
    folders = [tmp_path / name for name in "abcd"]
    for folder in folders:
        folder.mkdir()
    processes = [launch(folder) for folder in folders]
    for process in processes:
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, err
        assert sorted(out.splitlines()) == sorted(plain[1].stdout.splitlines())


def test_reader_that_leaves_does_not_fail_the_run(launch, tmp_path):
    process = launch(tmp_path, "prompt=The code", "generation.max_new_tokens=60")
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert len(results(tmp_path)) == 1


def test_agent_forks_its_ranks_beside_no_thread_of_the_store(launch, endless, tmp_path):
    """Its server's threads look up names under a lock of the C library; a rank that was forked
    meanwhile waited for that lock for ever.
    """
    process = launch(tmp_path, *endless)
    wait_for_text(process)
    agent = agent_of(process.pid)
    tasks = Path(f"/proc/{agent}/task").iterdir()
    names = [(task / "comm").read_text().strip() for task in tasks]
    assert not [name for name in names if "store" in name], names
