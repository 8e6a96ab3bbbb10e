"""What the kernel says of this host's cores: siblings, NUMA nodes, a container's quota.

Everything is read below a root path, so that tests describe hosts as trees of files. What cannot
be read counts as the plain case: one thread a core, one node, no quota.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_CPUS = "sys/devices/system/cpu"
_NODES = "sys/devices/system/node"
# Intel lists the small cores of a hybrid processor here; a rank on them would hold up all others.
_SMALL_CORES = "sys/devices/cpu_atom/cpus"


@dataclass(frozen=True)
class Topology:
    """The cores of a host.

    Attributes:
        siblings: for each logical CPU all those of its physical core, itself included.
        nodes: for each logical CPU its NUMA node.
        quota: how many cores' time the container may use, or None where nothing limits it.
        has_small_cores: not all cores are equally fast.
    """

    siblings: dict[int, frozenset[int]] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    quota: float | None = None
    has_small_cores: bool = False

    def physical_cores(self, cpus: Iterable[int]) -> list[frozenset[int]]:
        """The physical cores behind some logical CPUs, each as those CPUs that may be used."""
        allowed = frozenset(cpus)
        cores = {self.siblings.get(cpu, frozenset({cpu})) & allowed for cpu in allowed}
        return sorted(cores, key=min)

    def node_of(self, core: frozenset[int]) -> int:
        return self.nodes.get(min(core), 0)

    def nodes_of(self, cpus: Iterable[int]) -> list[int]:
        return sorted({self.nodes.get(cpu, 0) for cpu in cpus})


def read_topology(cpus: Iterable[int], root: Path = Path("/")) -> Topology:
    """The topology around some logical CPUs."""
    return Topology(
        siblings={cpu: _siblings(cpu, root) for cpu in cpus},
        nodes=_nodes(root),
        quota=read_quota(root),
        has_small_cores=bool(_text(root / _SMALL_CORES)),
    )


def allowed_cpus() -> frozenset[int]:
    """The logical CPUs that this process may run on; all of them where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def read_quota(root: Path = Path("/")) -> float | None:
    """The smallest quota of this process's control groups and those around them, in cores."""
    quotas = [*_quotas_v2(root), *_quotas_v1(root)]
    return min(quotas, default=None)


def memory_by_node(root: Path = Path("/")) -> dict[int, int]:
    """Bytes of this process's memory on each NUMA node, pages of mapped files included."""
    found: Counter[int] = Counter()
    for line in _text(root / "proc/self/numa_maps").splitlines():
        words = dict(word.partition("=")[::2] for word in line.split()[2:])
        page_bytes = int(words.get("kernelpagesize_kB", 4)) * 1024
        for name, count in words.items():
            if name[:1] == "N" and name[1:].isdecimal():
                found[int(name[1:])] += int(count) * page_bytes
    return dict(sorted(found.items()))


def parse_cpus(text: str) -> frozenset[int]:
    """The kernel's list format: `0-3,8` -> 0, 1, 2, 3, 8."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.strip():
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def format_cpus(cpus: Iterable[int]) -> str:
    """0, 1, 2, 3, 8 -> `0-3,8`."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def _siblings(cpu: int, root: Path) -> frozenset[int]:
    folder = root / _CPUS / f"cpu{cpu}/topology"
    text = _text(folder / "core_cpus_list") or _text(folder / "thread_siblings_list")
    return parse_cpus(text) | {cpu}


def _nodes(root: Path) -> dict[int, int]:
    found = {}
    for folder in sorted((root / _NODES).glob("node[0-9]*")):
        for cpu in parse_cpus(_text(folder / "cpulist")):
            found[cpu] = int(folder.name.removeprefix("node"))
    return found


def _quotas_v2(root: Path) -> Iterator[float]:
    """`max 100000`, or microseconds that may be used of each period."""
    for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
        for folder in _groups(root, mount, ""):
            words = _text(folder / "cpu.max").split()
            if len(words) == 2 and words[0] != "max":
                yield int(words[0]) / int(words[1])


def _quotas_v1(root: Path) -> Iterator[float]:
    """-1 is no quota."""
    for mount in ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"):
        for folder in _groups(root, mount, "cpu"):
            quota, period = (_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            if quota and period and int(quota) > 0:
                yield int(quota) / int(period)


def _groups(root: Path, mount: str, controller: str) -> Iterator[Path]:
    """The process's group of a controller and those around it, up to the mount.

    In a container the path may be the host's, which is not there: the mount itself is the group.
    """
    top = root / mount
    yield top
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = top / path.lstrip("/")
            yield from (item for item in (group, *group.parents) if top in item.parents)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
