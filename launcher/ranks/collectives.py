"""Which group a rank works in: shared memory, a network, or both, by where the ranks are."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.failures import ConfigError
from launcher.ranks.deadline import Deadline
from launcher.ranks.member import Member
from launcher.ranks.notice import Notice
from launcher.ranks.place import Place, is_running, is_stopped
from launcher.ranks.watch import Watch
from launcher.schema import ParallelSection
from parallel.collectives.network import TorchGroup
from parallel.collectives.segment import Segment, SegmentError
from parallel.collectives.shared_memory import SegmentLayout, SharedMemoryGroup
from parallel.collectives.signals import is_ordered_processor
from parallel.collectives.two_level import TwoLevelGroup
from parallel.errors import PeerError
from parallel.group import Group, LoneGroup

# Each run begins with such a wait: it must not be felt.
_POLL_S = 1e-3


def in_words() -> str:
    """What `parallel.collectives=auto` comes to on hosts such as this one."""
    if is_ordered_processor():
        return "shared memory inside a host, gloo between hosts, NCCL on GPUs"
    return "gloo (the stores of this processor are not ordered), NCCL on GPUs"


def open_group(
    member: Member, device: torch.device, section: ParallelSection, watch: Watch
) -> Group:
    """The group of all ranks of the job.

    Raises:
        ConfigError: `parallel.collectives` asks for what cannot be here.
        PeerError: a rank is gone, or late, while the ranks connect.
    """
    if member.size == 1:
        return LoneGroup()
    return _Opening(member, device, section, watch).open()


class _Processes:
    """The processes of this host's ranks, as the shared memory's waits ask for them."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places

    def is_running(self, rank: int) -> bool:
        return is_running(self._places[rank])

    def is_stopped(self, rank: int) -> bool:
        return is_running(self._places[rank]) and is_stopped(self._places[rank]["pid"])


class _Opening:
    """What the opening of a group needs to know; the arguments are those of `open_group`."""

    def __init__(
        self, member: Member, device: torch.device, section: ParallelSection, watch: Watch
    ) -> None:
        self._member = member
        self._device = device
        self._section = section
        self._watch = watch
        machines = [place["machine"] for place in member.places]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(machines))}
        self._hosts = [numbers[name] for name in machines]
        self._here = [rank for rank, name in enumerate(machines) if name == machines[member.rank]]

    def open(self) -> Group:
        chosen, reason = self._section.collectives, self._obstacle()
        if chosen == "shared_memory" and reason:
            raise ConfigError(
                f"`parallel.collectives` is shared_memory, but {reason}; write auto or gloo."
            )
        if chosen == "gloo" and self._device.type != "cpu":
            raise ConfigError(
                "`parallel.collectives` is gloo, but GPUs exchange over NCCL; write auto."
            )
        if chosen == "gloo" or self._obstacle(of_hosts=False):
            return self._over_network()
        return self._over_shared_memory()

    def _obstacle(self, *, of_hosts: bool = True) -> str:
        """What keeps the ranks from sharing memory, as far as can be known without trying."""
        if self._device.type != "cpu":
            return "the ranks compute on GPUs, which exchange over NCCL"
        if not is_ordered_processor():
            return f"the stores of this processor ({os.uname().machine}) are not ordered"
        if of_hosts and len(set(self._hosts)) > 1:
            return f"the ranks are on {len(set(self._hosts))} hosts"
        if len(set(self._hosts)) == self._member.size:
            return "no two ranks are on one host"
        return ""

    def _over_shared_memory(self) -> Group:
        segment, problem = self._share_segment()
        if segment is None:
            if self._section.collectives == "shared_memory":
                raise ConfigError(f"`parallel.collectives` is shared_memory, but {problem}.")
            if self._member.rank == 0:
                print(f"shardrun: the ranks exchange over gloo: {problem}", file=sys.stderr)
            return self._over_network()
        inside = self._inside(segment)
        if self._member.is_one_host:
            return inside
        return self._two_levels(inside)

    def _inside(self, segment: Segment) -> Group:
        """The ranks of this host."""
        if len(self._here) == 1:
            return LoneGroup()
        places, cores = self._member.places, self._member.places[self._member.rank]["cores"]
        num_sharers = sum(places[rank]["cores"] == cores for rank in self._here)
        return SharedMemoryGroup(
            self._here.index(self._member.rank),
            len(self._here),
            segment,
            self._section.timeout_s,
            _Processes(places),
            self._watch.describe_failure,
            is_crowded=num_sharers * torch.get_num_threads() > len(cores),
            names=self._here,
        )

    def _two_levels(self, inside: Group) -> Group:
        world = self._over_network()
        leaders = [self._hosts.index(host) for host in range(max(self._hosts) + 1)]
        members = dist.new_group(leaders)
        describe = self._watch.describe_failure
        between = TorchGroup(describe, members) if self._member.rank in leaders else None
        return TwoLevelGroup(self._hosts, inside, between, world, describe)

    def _share_segment(self) -> tuple[Segment | None, str]:
        """This host's segment; None and a reason on every rank where any rank cannot have it."""
        store = dist.PrefixStore("segment", self._member.store)
        rank, leader = self._member.rank, self._here[0]
        num_bytes = SegmentLayout(len(self._here)).num_bytes
        segment, problem = None, ""
        try:
            if rank == leader:
                segment = Segment.create(num_bytes)
                store.set(f"path/{rank}", segment.path)
            elif path := self._wait_for(store, "path", [leader])[0]:
                segment = Segment.attach(path, num_bytes)
        except SegmentError as error:
            problem = str(error)
            if rank == leader:
                store.set(f"path/{rank}", "")
        store.set(f"problem/{rank}", problem)
        problems = self._wait_for(store, "problem", range(self._member.size))
        if segment is not None:
            segment.forget_path()
        first = next((f"rank {each}: {text}" for each, text in enumerate(problems) if text), "")
        return (None if first else segment), first

    def _wait_for(self, store: dist.Store, what: str, ranks: Sequence[int]) -> list[str]:
        """The values of `what/RANK`; who is missing is said."""
        member = self._member
        deadline = Deadline(self._section.timeout_s, "parallel.timeout_s")
        missing = ranks
        try:
            with Notice(member.console, f"rank {member.rank}", deadline).given() as notice:
                notice.elect(store, f"{what}/{ranks[0]}")
                while missing := [each for each in missing if not store.check([f"{what}/{each}"])]:
                    listed = ", ".join(map(str, missing))
                    notice.whom = f"rank {listed} of {member.size} to connect"
                    if deadline.is_over:
                        raise PeerError(self._watch.describe_failure("connecting the ranks"))
                    time.sleep(_POLL_S)
            return [store.get(f"{what}/{each}").decode() for each in ranks]
        except dist.DistError as error:
            raise PeerError(self._watch.describe_failure("connecting the ranks")) from error

    def _over_network(self) -> TorchGroup:
        """gloo or NCCL between all ranks."""
        if self._member.is_one_host:
            # gloo would look up the host's name, which containers often cannot.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        is_gpu = self._device.type == "cuda"
        if is_gpu:
            torch.cuda.set_device(self._device)
        store = dist.PrefixStore("group", self._member.store)
        store.set(f"connects/{self._member.rank}", "")
        # torch's own wait, which follows, would be silent.
        self._wait_for(store, "connects", range(self._member.size))
        try:
            dist.init_process_group(
                "nccl" if is_gpu else "gloo",
                store=store,
                rank=self._member.rank,
                world_size=self._member.size,
                timeout=timedelta(seconds=self._section.timeout_s),
                device_id=self._device if is_gpu else None,
            )
        except RuntimeError as error:
            raise PeerError(self._watch.describe_failure("connecting the ranks")) from error
        return TorchGroup(self._watch.describe_failure)
