#!/bin/bash
# shardrun under MindSpore's real msrun, which starts a scheduler and the workers.
#
#   PYTHON=… MSRUN=DIRECTORY/bin/msrun CHECKPOINT=… EXPECTED=… bash tests/check_msrun.sh
#
# Outside of CI: needs `pip install mindspore` (about 1 GB), best in an environment of its own; the
# ranks run under $PYTHON, which needs no mindspore. Settings: tests/check_reference.sh. Exit 77: no
# msrun.

here=$(cd "$(dirname "$0")" && pwd)
MSRUN=${MSRUN:-$(command -v msrun)}
[ -x "$MSRUN" ] || { echo "check_msrun: no msrun; set MSRUN to its path"; exit 77; }
. "$here/check_reference.sh"
# msrun runs `python SCRIPT ARGUMENTS` with the python of PATH: its own.
export PATH="$(cd "$(dirname "$MSRUN")" && pwd):$PATH"

cat >"$WORK/rank.py" <<'P'
import os
import sys

os.execv(os.environ["PYTHON"], [os.environ["PYTHON"], *sys.argv[1:]])
P

msrun() { # SIZE LOG_DIR ARGUMENTS…: msrun, and rank 0's log on stdout
    "$MSRUN" --worker_num="$1" --local_worker_num="$1" --master_port="$(free_port)" \
        --cluster_time_out=60 --join=True --log_dir="$2" "$WORK/rank.py" "${@:3}" >"$2.msrun" 2>&1
    local status=$?
    cat "$2"/worker_0.log
    cat "$2"/*.log "$2.msrun" >&2
    return $status
}
export -f msrun free_port
export MSRUN WORK

check "msrun, two workers" bash -c 'msrun 2 "$WORK/two" "$@"' _ "${TEXT[@]}"
check "msrun, four workers" bash -c 'msrun 4 "$WORK/four" "$@"' _ "${TEXT[@]}"

# The first of two nodes, without --node_rank: its worker has no RANK_ID, ranks are handed out. The
# other node's worker is started by hand: a second msrun here would start a second scheduler.
two_nodes() {
    local port
    port=$(free_port)
    MS_ROLE=MS_WORKER MS_WORKER_NUM=2 MS_SCHED_HOST=127.0.0.1 MS_SCHED_PORT=$port \
        "$PYTHON" "$@" >"$WORK/other.out" 2>"$WORK/other.err" &
    "$MSRUN" --worker_num=2 --local_worker_num=1 --master_addr=127.0.0.1 --master_port="$port" \
        --cluster_time_out=60 --join=True --log_dir="$WORK/node" "$WORK/rank.py" "$@" \
        >"$WORK/node.msrun" 2>&1
    local status=$?
    wait $! || status=1
    cat "$WORK"/node/worker_*.log "$WORK/other.out"
    cat "$WORK"/node/*.log "$WORK/node.msrun" "$WORK/other.err" >&2
    return $status
}
export -f two_nodes
check "msrun with one of two workers, no RANK_ID" bash -c 'two_nodes "$@"' _ "${TEXT[@]}"

# The log is msrun's: stdout follows it, so that the kill comes while text is made.
check_kill "msrun, SIGKILL to rank 1" RANK_ID=1 bash -c '
    msrun 2 "$WORK/kill" "$@" >/dev/null & pid=$!
    until grep -qs text_generation_text "$WORK/kill/worker_0.log"; do sleep 0.1; done
    echo text_generation_text
    wait $pid' _ "${LONG[@]}"
finish
