"""How cores are divided among the ranks of a host, on hosts described as trees of files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.environment.ancestry import was_set_by
from launcher.host.cores import Seat, divide
from launcher.host.topology import (
    Topology,
    allowed_cpus,
    format_cpus,
    memory_by_node,
    parse_cpus,
    read_quota,
    read_topology,
)
from launcher.host.wishes import Wishes, read_wishes
from launcher.timeline import Timeline

ROOT = Path(__file__).resolve().parents[1]
QUOTA = "a quota of 1.5 cores' time says not which cores"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def two_sockets(root: Path) -> Path:
    """2 sockets of 4 cores of 2 threads, numbered as Linux does: siblings are 8 apart."""
    for cpu in range(16):
        core = cpu % 8
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(folder / "core_cpus_list", f"{core},{core + 8}")
    write(root / "sys/devices/system/node/node0/cpulist", "0-3,8-11")
    write(root / "sys/devices/system/node/node1/cpulist", "4-7,12-15")
    return root


def seats(root: Path, num_ranks: int, cpus: str = "0-15", **wishes) -> list[tuple[str, int]]:
    allowed = parse_cpus(cpus)
    found = divide(read_topology(allowed, root), [allowed] * num_ranks, Wishes(**wishes))
    return [(format_cpus(seat.cpus), seat.threads) for seat in found]


@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [
        (1, [("0-15", 8)]),
        (2, [("0-3,8-11", 4), ("4-7,12-15", 4)]),
        (3, [("0-1,8-9", 2), ("2-3,10-11", 2), ("4-5,12-13", 2)]),
        (4, [("0-1,8-9", 2), ("2-3,10-11", 2), ("4-5,12-13", 2), ("6-7,14-15", 2)]),
        (5, [("0,8", 1), ("1,9", 1), ("2,10", 1), ("4,12", 1), ("5,13", 1)]),
        (8, [(f"{core},{core + 8}", 1) for core in range(8)]),
        (20, [("0-15", 1)] * 20),
    ],
)
def test_ranks_get_whole_cores_of_one_node(tmp_path, num_ranks, expected):
    assert seats(two_sockets(tmp_path), num_ranks) == expected


def test_rank_that_fits_on_no_node_spans_what_is_left(tmp_path):
    write(tmp_path / "sys/devices/system/node/node0/cpulist", "0-2")
    write(tmp_path / "sys/devices/system/node/node1/cpulist", "3-5")
    assert seats(tmp_path, 3, "0-5") == [("0-1", 2), ("3-4", 2), ("2,5", 2)]


def test_sibling_threads_are_no_cores(tmp_path):
    """Bound to both threads of one core, one thread computes; more ranks than cores share."""
    root = two_sockets(tmp_path)
    assert seats(root, 1, "0,8") == [("0,8", 1)]
    assert seats(root, 2, "0,8") == [("0,8", 1)] * 2


def test_offline_cores_are_not_counted(tmp_path):
    """The kernel lists neither an offline core nor its files; its sibling goes on alone."""
    root = two_sockets(tmp_path)
    (root / "sys/devices/system/cpu/cpu9/topology/core_cpus_list").unlink()
    write(root / "sys/devices/system/cpu/cpu1/topology/core_cpus_list", "1")
    write(root / "sys/devices/system/node/node0/cpulist", "0-3,8,10-11")
    assert seats(root, 4, "0-8,10-15")[0] == ("0-1,8", 2)


def test_inherited_affinity_is_divided_as_it_is(tmp_path):
    root = two_sockets(tmp_path)
    assert seats(root, 2, "1,3") == [("1", 1), ("3", 1)]
    assert seats(root, 1, "1,3") == [("1,3", 2)]


def test_ranks_bound_by_their_launcher_keep_their_cores(tmp_path):
    allowed = [parse_cpus("0-1,8-9"), parse_cpus("4-7,12-15")]
    found = divide(read_topology(range(16), two_sockets(tmp_path)), allowed, Wishes())
    assert found == [Seat(allowed[0], 2), Seat(allowed[1], 4)]


def test_ranks_bound_to_a_socket_divide_that_socket(tmp_path):
    sockets = [parse_cpus("0-3,8-11"), parse_cpus("4-7,12-15")]
    allowed = [sockets[0], sockets[1], sockets[0], sockets[1]]
    found = divide(read_topology(range(16), two_sockets(tmp_path)), allowed, Wishes())
    assert [format_cpus(seat.cpus) for seat in found] == [
        "0-1,8-9", "4-5,12-13", "2-3,10-11", "6-7,14-15",
    ]  # fmt: skip


def test_overlapping_affinities_are_left_alone():
    allowed = [parse_cpus("0-3"), parse_cpus("2-5")]
    found = divide(Topology(), allowed, Wishes())
    assert [(seat.cpus, seat.threads) for seat in found] == [(allowed[0], 3), (allowed[1], 3)]
    assert all("overlap" in seat.floating for seat in found)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_quota_bounds_the_threads_and_binds_nobody(tmp_path, version):
    """Other containers of the host would all choose the same cores."""
    root = two_sockets(tmp_path)
    if version == "v2":
        write(root / "proc/self/cgroup", "0::/kubepods/pod1")
        write(root / "sys/fs/cgroup/cpu.max", "max 100000")
        write(root / "sys/fs/cgroup/kubepods/cpu.max", "150000 100000")
        write(root / "sys/fs/cgroup/kubepods/pod1/cpu.max", "max 100000")
    else:
        write(root / "proc/self/cgroup", "4:cpu,cpuacct:/docker/beef")
        write(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "150000")
        write(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert read_quota(root) == 1.5
    for num_ranks in (1, 2):
        assert seats(root, num_ranks) == [("0-15", 1)] * num_ranks
    allowed = parse_cpus("0-15")
    (seat,) = divide(read_topology(allowed, root), [allowed], Wishes())
    assert seat.floating == QUOTA


def test_quota_is_divided_and_a_large_one_does_not_matter(tmp_path):
    root = two_sockets(tmp_path)
    write(root / "sys/fs/cgroup/cpu.max", "600000 100000")
    assert seats(root, 2) == [("0-15", 3)] * 2
    write(root / "sys/fs/cgroup/cpu.max", "1600000 100000")
    assert seats(root, 2) == [("0-3,8-11", 4), ("4-7,12-15", 4)]


def test_unlimited_groups_are_no_quota(tmp_path):
    write(tmp_path / "sys/fs/cgroup/cpu.max", "max 100000")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert read_quota(tmp_path) is None


def test_cores_of_two_sizes_bind_nobody(tmp_path):
    write(tmp_path / "sys/devices/cpu_atom/cpus", "4-7")
    assert seats(tmp_path, 2, "0-7") == [("0-7", 4)] * 2


def test_wished_threads_keep_the_share_unless_they_exceed_it(tmp_path):
    root = two_sockets(tmp_path)
    assert seats(root, 2, threads=1) == [("0-3,8-11", 1), ("4-7,12-15", 1)]
    assert seats(root, 2, threads=9) == [("0-15", 9)] * 2
    assert seats(root, 2, floating="parallel.pin is false") == [("0-15", 4)] * 2


@pytest.mark.parametrize(
    ("variables", "set_by_torchrun", "threads"),
    [
        ({}, False, None),
        ({"OMP_NUM_THREADS": "3"}, False, 3),
        ({"OMP_NUM_THREADS": "3,2"}, False, 3),
        ({"OMP_NUM_THREADS": "many"}, False, None),
        ({"OMP_NUM_THREADS": "1"}, True, None),
        ({"OMP_NUM_THREADS": "1"}, False, 1),
        ({"OMP_NUM_THREADS": "2"}, False, 2),
    ],
)
def test_threads_of_the_environment_count_unless_torchrun_set_them(
    variables, set_by_torchrun, threads
):
    wishes = read_wishes(None, True, variables, lambda _: set_by_torchrun)
    assert wishes.threads == threads
    assert bool(wishes.note) == set_by_torchrun


def test_configuration_goes_before_the_environment():
    assert read_wishes(2, True, {"OMP_NUM_THREADS": "3"}) == Wishes(2)
    assert read_wishes(None, False, {}).floating == "parallel.pin is false"


def test_system_without_affinities_divides_threads_and_binds_nobody(monkeypatch, tmp_path):
    """macOS."""
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    wishes = read_wishes(None, True, {})
    assert wishes.floating == "this system binds no process to cores"
    found = divide(read_topology(allowed_cpus(), tmp_path), [allowed_cpus()] * 2, wishes)
    assert found == [Seat(parse_cpus("0-5"), 3, wishes.floating)] * 2


def test_openmp_that_binds_by_itself_is_left_alone():
    wishes = read_wishes(None, True, {"OMP_PROC_BIND": "close"})
    assert wishes == Wishes(floating="OMP_PROC_BIND is set", openmp_binds=True)
    assert not read_wishes(None, True, {"OMP_PROC_BIND": "false"}).floating


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name_is_given", [True, False])
def test_variable_of_a_process_is_told_from_what_it_was_started_with(name_is_given):
    variables = {"OTHER": "1", **({"MINE": "1"} if name_is_given else {})}
    script = "import os; os.environ['MINE'] = '2'; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        assert was_set_by(process.pid, "MINE") is not name_is_given
        process.communicate("\n")


def test_lists_of_cpus_are_the_kernels():
    assert parse_cpus("0-3,8\n") == {0, 1, 2, 3, 8}
    assert parse_cpus("\n") == frozenset()
    assert format_cpus({8, 0, 2, 3, 1}) == "0-3,8"
    assert format_cpus(()) == ""


def test_memory_is_counted_by_node(tmp_path):
    lines = [
        "55f000 default file=/usr/bin/N2=x mapped=2 N0=2 kernelpagesize_kB=4",
        "7f0000 default anon=3 dirty=3 N0=1 N1=2 kernelpagesize_kB=2048",
        "7fff00 default stack",
    ]
    write(tmp_path / "proc/self/numa_maps", "\n".join(lines))
    assert memory_by_node(tmp_path) == {0: 2 * 4096 + 2**21, 1: 2 * 2**21}


_TAKE_THE_SECOND_SEAT = """
import json, os
from pathlib import Path
import torch
from launcher.host.seat import take_seat
from launcher.host.topology import allowed_cpus
from launcher.host.wishes import Wishes

before = {entry.name for entry in Path("/proc/self/task").iterdir()}
taken = take_seat([allowed_cpus()] * 2, 1, Wishes())
# Two threads, whatever the share: OpenMP's must be where the rank is.
torch.set_num_threads(2)
torch.ones(1 << 22).add_(1)
started = {entry.name for entry in Path("/proc/self/task").iterdir()} - before
print(json.dumps({
    "wanted": sorted(taken.seat.cpus), "floating": taken.seat.floating, "refused": taken.refused,
    "main": sorted(os.sched_getaffinity(0)),
    "threads": [sorted(os.sched_getaffinity(int(name))) for name in started],
    "report": taken.report(),
}))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process")
def test_bound_rank_and_its_openmp_threads_run_on_its_cores_as_read_back():
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    environ.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", _TAKE_THE_SECOND_SEAT]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environ, timeout=120
    )
    found = json.loads(done.stdout)
    if found["floating"]:
        pytest.skip(f"this host's cores cannot be divided by two: {found['floating']}")
    assert found["refused"] == ""
    assert found["main"] == found["wanted"]
    assert found["threads"], "OpenMP started no thread"
    assert all(cpus == found["wanted"] for cpus in found["threads"])
    assert found["report"]["cores"] == format_cpus(found["wanted"])
    assert found["report"]["floating"] == ""


def test_stages_of_a_start_add_up():
    timeline = Timeline(100.0)
    timeline.mark("imports", 100.5)
    timeline.mark("prefill", 102.0)
    assert timeline.durations() == {"imports_s": 0.5, "prefill_s": 1.5}
