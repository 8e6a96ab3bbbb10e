#!/bin/bash
# A two-node Slurm on this machine, and shardrun under sbatch and srun in it.
#
#   PYTHON=… CHECKPOINT=… EXPECTED=… bash tests/check_slurm.sh
#
# Outside of CI: needs root, Debian's packages slurm-wlm and munge, and a running munged (or the
# right to start one). Settings: tests/check_reference.sh. Exit 77: something is missing.

here=$(cd "$(dirname "$0")" && pwd)
for command in slurmctld slurmd srun sbatch munge munged; do
    command -v $command >/dev/null || { echo "check_slurm: $command is not installed"; exit 77; }
done
[ "$(id -u)" = 0 ] || { echo "check_slurm: only root can start slurmd"; exit 77; }
. "$here/check_reference.sh"

cluster=$WORK/slurm
mkdir -p "$cluster/state" "$cluster/spool.n1" "$cluster/spool.n2"
stop() { # only the daemons started here
    local file pid pids=()
    for file in "$cluster"/*.pid; do
        [ -f "$file" ] && pids+=("$(cat "$file")")
    done
    [ -n "${munged:-}" ] && pids+=("$munged")
    [ ${#pids[@]} = 0 ] && return
    kill "${pids[@]}" 2>/dev/null
    for pid in "${pids[@]}"; do
        timeout 10 tail --pid="$pid" -f /dev/null
    done
}
trap stop EXIT

if ! munge -n >/dev/null 2>&1; then
    [ -f /etc/munge/munge.key ] || mungekey --create
    mkdir -p /run/munge && chown munge: /run/munge
    runuser -u munge -- munged || { echo "check_slurm: munged does not start"; exit 77; }
    munged=$(cat /run/munge/munged.pid)
fi
host=$(hostname -s)
cat >"$cluster/slurm.conf" <<C
ClusterName=check
SlurmctldHost=$host
SlurmctldPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool.%n
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd.%n.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName=n1 NodeHostname=$host Port=$(free_port) CPUs=$(getconf _NPROCESSORS_ONLN)
NodeName=n2 NodeHostname=$host Port=$(free_port) CPUs=$(getconf _NPROCESSORS_ONLN)
PartitionName=p Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE OverSubscribe=YES
C
export SLURM_CONF=$cluster/slurm.conf
slurmctld -c && slurmd -N n1 && slurmd -N n2
for _ in $(seq 100); do
    [ "$(timeout 5 sinfo -h -o %T 2>/dev/null)" = idle ] && break
    sleep 0.2
done
timeout 20 srun -N2 -n2 true || { echo "check_slurm: the cluster did not come up"; exit 77; }

# The nodes' names, n1 and n2, have no address here; on a real cluster they have.
export MASTER_ADDR=127.0.0.1
batch() { # NODES TASKS LINE: the line as a batch script; its output on ours
    printf '#!/bin/bash\n%s\n' "$3" >"$cluster/batch.sh"
    local job left=170
    job=$(sbatch --parsable -N"$1" -n"$2" -o "$cluster/batch.out" -e "$cluster/batch.err" \
        "$cluster/batch.sh")
    while squeue -h -j "$job" 2>/dev/null | grep -q . && [ $left -gt 0 ]; do
        sleep 1
        left=$((left - 1))
    done
    cat "$cluster/batch.out"
    cat "$cluster/batch.err" >&2
    scontrol show job "$job" | grep -q ExitCode=0:0
}
# `check` runs its command under `timeout`, which cannot call a function of this script.
printf -v text '%q ' "$PYTHON" "${TEXT[@]}"
export -f batch
export cluster text

check "srun -N1 -n2" srun -N1 -n2 "$PYTHON" "${TEXT[@]}"
check "srun -N2 -n4" srun -N2 -n4 "$PYTHON" "${TEXT[@]}"
check "sbatch, a batch script alone" bash -c 'batch 1 2 "$text"'
check "sbatch, srun -n2 inside" bash -c 'batch 2 4 "srun -N1 -n2 $text"'
check "srun, torchrun on each of two nodes" srun -N2 -n2 bash -c \
    'exec "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 \
    --node-rank $SLURM_NODEID --master-addr 127.0.0.1 --master-port "$0" "$@"' \
    "$(free_port)" "${TEXT[@]}"
check_kill "srun -N1 -n2, SIGKILL to rank 1" SLURM_PROCID=1 srun -N1 -n2 "$PYTHON" "${LONG[@]}"
check_kill "srun -N2 -n2, SIGKILL to rank 1" SLURM_PROCID=1 srun -N2 -n2 "$PYTHON" "${LONG[@]}"
check_kill "srun -N1 -n2, SIGKILL to rank 0" SLURM_PROCID=0 srun -N1 -n2 "$PYTHON" "${LONG[@]}"
trap - EXIT
stop
finish
