"""Which launcher started this process, from the variables that each is known to set."""

from __future__ import annotations

import pytest

from launcher.environment.detection import detect
from launcher.environment.size import decide_size
from launcher.environment.slurm import first_host
from launcher.environment.worker import WorkerEnvironment
from launcher.failures import LaunchError

# What msrun 2.10.0 gives its processes with --worker_num=2 --cluster_time_out=10.
MSRUN_SCHEDULER = {
    "MS_ROLE": "MS_SCHED",
    "MS_SCHED_HOST": "127.0.0.1",
    "MS_SCHED_PORT": "8123",
    "MS_TOPO_TIMEOUT": "10",
    "MS_WORKER_NUM": "2",
    "RANK_ID": "0",
    "RANK_SIZE": "2",
}
MSRUN_WORKER = {**MSRUN_SCHEDULER, "MS_ROLE": "MS_WORKER", "MS_NODE_ID": "1", "DEVICE_ID": "1"}
MSRUN_WORKER["RANK_ID"] = "1"

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
}

# Slurm 22.05: sbatch -N2 -n4, in the batch script and in a step of `srun -N2 -n4`.
SLURM_BATCH = {
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
}
SLURM_STEP = {
    **SLURM_BATCH,
    "SLURM_LOCALID": "2",
    "SLURM_PROCID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
}
SLURM_ONE_NODE = {**SLURM_STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n1"}

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "698155009",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def size_of(environ: dict[str, str], tp: int | None = None, prepared: int | None = None) -> int:
    return decide_size(detect(environ), tp, prepared, default=1)[0]


def refusal(environ: dict[str, str], tp: int | None = None) -> str:
    with pytest.raises(LaunchError) as caught:
        decide_size(detect(environ), tp, None, default=1)
    return str(caught.value)


def test_an_empty_environment_is_plain() -> None:
    assert detect({}) == WorkerEnvironment()
    assert detect({}).is_plain


@pytest.mark.parametrize(
    "environ", [{"RANK": "", "WORLD_SIZE": ""}, {"RANK": "", "WORLD_SIZE": "1"}, {"PMI_RANK": ""}]
)
def test_an_empty_variable_says_nothing(environ: dict[str, str]) -> None:
    assert detect({**environ, "PMI_SIZE": "2", "OMPI_COMM_WORLD_SIZE": ""}).is_plain


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": ""}, "RANK=3 is set without WORLD_SIZE"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not; launch with torchrun"),
        ({"MASTER_PORT": ""}, "MASTER_PORT not; launch with torchrun"),
    ],
)
def test_an_empty_variable_of_torchrun_is_missed_by_name(
    change: dict[str, str], words: str
) -> None:
    assert words in refusal({**TORCHRUN, **change})


def test_an_empty_port_leaves_slurms_own() -> None:
    assert detect({**SLURM_STEP, "MASTER_PORT": ""}).store == detect(SLURM_STEP).store


def test_torchrun_gives_rank_size_and_store() -> None:
    environment = detect(TORCHRUN)
    assert (environment.launcher, environment.rank, environment.size) == ("torchrun", 3, 4)
    assert (environment.local_rank, environment.store) == (1, "n1:29500")


def test_torchrun_with_one_rank_is_torchrun() -> None:
    assert detect({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}).launcher == "torchrun"


def test_ranks_of_two_torchrun_agents_share_the_job() -> None:
    assert detect(TORCHRUN, parent_pid=1).job == detect(TORCHRUN, parent_pid=2).job


def test_a_restart_by_torchrun_is_another_job() -> None:
    assert detect(TORCHRUN).job != detect({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"}).job


def test_msrun_worker_has_its_rank() -> None:
    environment = detect(MSRUN_WORKER)
    assert (environment.launcher, environment.rank, environment.size) == ("mindspore", 1, 2)
    assert (environment.local_rank, environment.store) == (1, "127.0.0.1:8123")
    assert environment.start_timeout_s == 10
    assert not environment.is_scheduler


def test_msrun_scheduler_is_no_rank_though_its_rank_id_is_0() -> None:
    environment = detect(MSRUN_SCHEDULER)
    assert environment.is_scheduler
    assert environment.rank is None
    assert environment.size == 2


def test_a_worker_without_rank_id_gets_its_rank_at_the_rendezvous() -> None:
    environ = {key: value for key, value in MSRUN_WORKER.items() if key[:2] == "MS"}
    del environ["MS_NODE_ID"]
    environment = detect(environ)
    assert environment.rank is None
    assert not environment.is_scheduler


def test_a_numeric_node_id_is_the_rank_and_another_name_is_none() -> None:
    environ = {key: value for key, value in MSRUN_WORKER.items() if key != "RANK_ID"}
    assert detect(environ).rank == 1
    assert detect({**environ, "MS_NODE_ID": "worker-b"}).rank is None


def test_a_negative_topology_timeout_leaves_our_own() -> None:
    assert detect({**MSRUN_WORKER, "MS_TOPO_TIMEOUT": "-1"}).start_timeout_s is None


def test_msrun_inside_srun_is_msrun() -> None:
    environment = detect({**SLURM_STEP, **MSRUN_WORKER})
    assert (environment.launcher, environment.rank, environment.size) == ("mindspore", 1, 2)
    assert "slurm is around mindspore" in environment.notes[0]


def test_ms_worker_num_without_role_is_a_wish() -> None:
    environment = detect({"MS_WORKER_NUM": "4"})
    assert environment.is_plain
    assert environment.requested_size == 4
    size, notes = decide_size(environment, None, None, 1)
    assert size == 4
    assert "MS_WORKER_NUM=4 is set" in notes[0]


def test_rank_variables_of_mindspore_without_role_are_unused_and_said() -> None:
    environment = detect({"RANK_ID": "3", "RANK_SIZE": "8"})
    assert environment.is_plain
    assert environment.notes == ("RANK_ID, RANK_SIZE set without MS_ROLE: not used",)


def test_a_slurm_batch_script_is_plain() -> None:
    assert detect(SLURM_BATCH).is_plain


@pytest.mark.parametrize("step", ["4294967290", "4294967291", "4294967292", "interactive"])
def test_a_special_slurm_step_is_plain(step: str) -> None:
    assert detect({**SLURM_STEP, "SLURM_STEP_ID": step}).is_plain


def test_an_srun_step_gives_ranks_and_a_store_on_its_first_node() -> None:
    environment = detect(SLURM_STEP)
    assert (environment.launcher, environment.rank, environment.size) == ("slurm", 2, 4)
    host, _, port = str(environment.store).partition(":")
    assert host == "n1"
    assert 20000 <= int(port) < 32000


def test_neighbouring_steps_use_other_ports() -> None:
    other = {**SLURM_STEP, "SLURM_STEP_ID": "1"}
    assert detect(SLURM_STEP).store != detect(other).store


def test_the_reserved_port_of_a_step_is_used() -> None:
    assert detect({**SLURM_STEP, "SLURM_STEP_RESV_PORTS": "12007-12008"}).store == "n1:12007"


def test_a_master_address_beats_slurms_node_name() -> None:
    assert str(detect({**SLURM_STEP, "MASTER_ADDR": "10.0.0.1"}).store).startswith("10.0.0.1:")


def test_an_srun_step_on_one_node_opens_its_own_store() -> None:
    environment = detect(SLURM_ONE_NODE)
    assert environment.store is None
    assert environment.job == "slurm-2-0"


def test_one_srun_task_starts_ranks_itself() -> None:
    environ = {**SLURM_ONE_NODE, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    environment = detect({**environ, "MS_WORKER_NUM": "2"})
    assert environment.is_plain
    assert environment.requested_size == 2
    assert "started one task" in environment.notes[0]


def test_openmpi_gives_ranks() -> None:
    environment = detect(OPENMPI, parent_pid=7)
    assert (environment.launcher, environment.rank, environment.size) == ("openmpi", 1, 2)
    assert environment.store is None
    assert environment.job == "openmpi-698155009"


def test_mpich_gives_ranks_and_its_daemon_is_the_job() -> None:
    environment = detect(MPICH, parent_pid=7)
    assert (environment.launcher, environment.rank, environment.size) == ("pmi", 1, 2)
    assert environment.job == "pmi-7"


def test_mpirun_on_several_hosts_needs_an_address() -> None:
    environ = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert "export rank 0's host" in refusal(environ)
    assert detect({**environ, "MASTER_ADDR": "h", "MASTER_PORT": "9"}).store == "h:9"


def test_mpirun_in_a_slurm_job_counts_its_own_ranks() -> None:
    """On the other nodes mpirun's daemons are srun's tasks, one a node."""
    environ = {**SLURM_STEP, **OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    there = detect({**environ, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "1"})
    here = detect({**SLURM_BATCH, **OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    assert there.size == here.size == 2
    assert there.store == here.store


def test_torchrun_inside_srun_is_torchrun() -> None:
    environment = detect(
        {**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **TORCHRUN}
    )
    assert (environment.launcher, environment.rank, environment.size) == ("torchrun", 3, 4)
    assert "slurm is around torchrun" in environment.notes[0]


def test_a_script_may_hand_slurms_numbers_to_torch() -> None:
    environ = {**SLURM_STEP, "RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "n1"}
    assert detect({**environ, "MASTER_PORT": "29500"}).rank == 2


def test_hand_set_torch_variables_must_be_slurms() -> None:
    stale = {"MASTER_ADDR": "n1", "MASTER_PORT": "1", "RANK": "2", "WORLD_SIZE": "8"}
    message = refusal({**SLURM_STEP, **stale})
    assert "WORLD_SIZE=8" in message
    assert "SLURM_STEP_NUM_TASKS=4" in message
    message = refusal({**SLURM_STEP, **stale, "WORLD_SIZE": "4", "RANK": "0"})
    assert "SLURM_PROCID=2" in message


def test_three_sizes_are_refused_by_name() -> None:
    message = refusal({"MS_WORKER_NUM": "8", "WORLD_SIZE": "4"}, tp=2)
    assert "MS_WORKER_NUM=8, WORLD_SIZE=4, parallel.tp=2" in message


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (TORCHRUN, "torchrun's number of ranks=4"),
        (MSRUN_WORKER, "mindspore's number of ranks=2"),
        (SLURM_ONE_NODE, "slurm's number of ranks=4"),
        ({"MS_WORKER_NUM": "2"}, "MS_WORKER_NUM=2"),
    ],
)
def test_another_tp_than_the_launchers_is_refused(environ: dict[str, str], said: str) -> None:
    message = refusal(environ, tp=8)
    assert said in message
    assert "parallel.tp=8" in message


def test_a_stale_rank_is_refused() -> None:
    assert "RANK=3 is set without WORLD_SIZE" in refusal({"RANK": "3"})


def test_a_stale_world_size_is_refused() -> None:
    assert "WORLD_SIZE is set without RANK (WORLD_SIZE=4)" in refusal({"WORLD_SIZE": "4"})


def test_a_world_size_that_agrees_with_the_launcher_is_harmless() -> None:
    assert size_of({**MSRUN_WORKER, "WORLD_SIZE": "2"}) == 2
    assert size_of({**SLURM_ONE_NODE, "WORLD_SIZE": "4"}) == 4


def test_a_world_size_that_contradicts_the_launcher_is_refused() -> None:
    message = refusal({**SLURM_ONE_NODE, "WORLD_SIZE": "2"})
    assert "slurm's number of ranks=4, WORLD_SIZE=2" in message


def test_torch_variables_by_hand_need_an_address() -> None:
    message = refusal({"RANK": "0", "WORLD_SIZE": "2"})
    assert "MASTER_ADDR and MASTER_PORT" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK_SIZE": "4"}, "RANK_SIZE must be MS_WORKER_NUM=2, but is 4"),
        ({"RANK_ID": "2", "MS_NODE_ID": "2"}, "RANK_ID must be below MS_WORKER_NUM=2, but is 2"),
        ({"RANK_ID": "-1", "MS_NODE_ID": ""}, "RANK_ID must be below MS_WORKER_NUM=2, but is -1"),
        ({"RANK_ID": "0"}, "RANK_ID and MS_NODE_ID must be one rank, but are 0 and 1"),
        ({"RANK_ID": "one"}, "RANK_ID must be an integer, but is 'one'"),
        ({"MS_WORKER_NUM": "0"}, "MS_WORKER_NUM must be at least 1, but is 0"),
        ({"MS_WORKER_NUM": "2.0"}, "MS_WORKER_NUM must be an integer, but is '2.0'"),
        ({"MS_SCHED_PORT": "99999"}, "MS_SCHED_PORT must be a port from 1 to 65535"),
        ({"MS_SCHED_HOST": ""}, "MS_ROLE=MS_WORKER needs MS_SCHED_HOST"),
        ({"MS_TOPO_TIMEOUT": "long"}, "MS_TOPO_TIMEOUT must be an integer"),
        ({"MS_ROLE": "MS_WORKR"}, "MS_ROLE must be MS_WORKER or MS_SCHED, but is 'MS_WORKR'"),
        ({"MS_ROLE": "MS_PSERVER"}, "but is 'MS_PSERVER'"),
    ],
)
def test_a_bad_mindspore_variable_is_named(change: dict[str, str], words: str) -> None:
    assert words in refusal({**MSRUN_WORKER, **change})


# Every launcher's own number of ranks is 4, 4, 2 and 2 here.
RANKED = {"torchrun": TORCHRUN, "slurm": SLURM_ONE_NODE, "openmpi": OPENMPI, "pmi": MPICH}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "9"}


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        *((name, "MS_WORKER_NUM") for name in RANKED),
        *((name, "WORLD_SIZE") for name in RANKED if name != "torchrun"),
    ],
)
def test_a_number_that_contradicts_the_launchers_is_seen_before_anybody_waits(
    name: str, variable: str
) -> None:
    size = detect(RANKED[name]).size
    detect({**RANKED[name], variable: str(size)})
    with pytest.raises(LaunchError) as caught:
        detect({**RANKED[name], variable: "3"})
    assert f"{name}'s number of ranks={size}, {variable}=3; unset" in str(caught.value)


@pytest.mark.parametrize("role", ["MS_WORKER", "MS_SCHED"])
def test_a_number_that_contradicts_msruns_is_seen_before_anybody_waits(role: str) -> None:
    with pytest.raises(LaunchError, match="mindspore's number of ranks=2, WORLD_SIZE=3"):
        detect({**MSRUN_SCHEDULER, "MS_ROLE": role, "WORLD_SIZE": "3"})


def test_hand_set_torch_variables_beside_another_ms_worker_num_are_refused_at_once() -> None:
    with pytest.raises(LaunchError, match="torchrun's number of ranks=2, MS_WORKER_NUM=4"):
        detect({**BY_HAND, "RANK": "0", "MS_WORKER_NUM": "4"})


# Two launchers at once, of which the inner decides: one may start the other, so sizes may differ.
PAIRS = [
    ("torchrun", TORCHRUN, SLURM_ONE_NODE),
    ("torchrun", TORCHRUN, OPENMPI),
    ("torchrun", TORCHRUN, MPICH),
    ("openmpi", OPENMPI, SLURM_ONE_NODE),
    ("openmpi", OPENMPI, {**MPICH, "PMI_SIZE": "4"}),
    ("pmi", MPICH, SLURM_ONE_NODE),
    ("mindspore", MSRUN_WORKER, SLURM_ONE_NODE),
    ("mindspore", MSRUN_WORKER, {**OPENMPI, "OMPI_COMM_WORLD_SIZE": "4"}),
    ("mindspore", MSRUN_WORKER, {**MPICH, "PMI_SIZE": "4"}),
]


@pytest.mark.parametrize(("inner", "inside", "around"), PAIRS)
def test_of_two_launchers_the_inner_decides_and_the_outer_is_said(
    inner: str, inside: dict[str, str], around: dict[str, str]
) -> None:
    environment = detect({**around, **inside})
    assert (environment.launcher, environment.size) == (inner, detect(inside).size)
    assert any(f"is around {inner}, which decides" in note for note in environment.notes)


@pytest.mark.parametrize("around", [SLURM_ONE_NODE, OPENMPI, MPICH, MSRUN_WORKER])
@pytest.mark.parametrize("change", [{"RANK": "0"}, {"WORLD_SIZE": "8"}])
def test_torch_variables_that_a_script_has_set_must_be_its_launchers(
    around: dict[str, str], change: dict[str, str]
) -> None:
    """Where no torchrun was, nobody starts the ranks of another number."""
    with pytest.raises(LaunchError) as caught:
        detect({**around, **BY_HAND, **change})
    (name, value), *_ = change.items()
    assert f"{name}={value}" in str(caught.value)


@pytest.mark.parametrize("environ", [*RANKED.values(), {}])
def test_mindspores_variables_without_a_role_are_said_under_any_launcher(
    environ: dict[str, str],
) -> None:
    notes = detect({**environ, "RANK_ID": "7", "DEVICE_ID": "7"}).notes
    assert "RANK_ID, DEVICE_ID set without MS_ROLE: not used" in notes


def test_what_all_processes_would_say_is_said_by_one() -> None:
    workers = [detect({**MSRUN_WORKER, "RANK_ID": rank, "MS_NODE_ID": rank}) for rank in "01"]
    unnamed = {key: value for key, value in MSRUN_WORKER.items() if "ID" not in key}
    environments = [detect(MSRUN_SCHEDULER), *workers, detect(unnamed)]
    assert [environment.speaks for environment in environments] == [False, True, False, False]
    assert detect({}).speaks


def test_mindspore_and_torchrun_at_once_are_refused() -> None:
    message = refusal({**MSRUN_WORKER, **TORCHRUN})
    assert "MS_ROLE=MS_WORKER" in message
    assert "RANK=3" in message


@pytest.mark.parametrize("rank", ["4", "-1"])
def test_a_rank_outside_the_size_is_refused(rank: str) -> None:
    assert f"RANK must be below WORLD_SIZE=4, but is {rank}" in refusal({**TORCHRUN, "RANK": rank})


def test_a_prepared_size_counts_only_where_nothing_else_does() -> None:
    assert size_of({}, prepared=8) == 8
    assert size_of({}, tp=2, prepared=8) == 2
    assert size_of(MSRUN_WORKER, prepared=8) == 2
    assert size_of({}) == 1


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[03-05,9],m1", "n03"),
        ("n[7,9]", "n7"),
        ("m1,n[1-2]", "m1"),
        ("rack[1-2]-gpu,x", "rack1-gpu"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first
