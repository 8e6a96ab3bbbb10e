# Sourced by check_slurm.sh, check_mpi.sh and check_msrun.sh: what a launcher's run must print, and
# how a killed rank must end it. Settings, from the environment:
#
#   PYTHON      the interpreter that has shardrun (default: python3)
#   CHECKPOINT  directory of a checkpoint (default: the embedded demo model)
#   EXPECTED    file with the text (default: what one plain rank prints)
#   PROMPT, MAX_NEW_TOKENS
#
# `check NAME COMMAND…` runs COMMAND, which must print the text once; `check_kill NAME RANK=1
# COMMAND…` kills the rank whose environment has that line: all must end within 10 s, with a status
# that is not 0 and the process named. Both print PASS or FAIL.

PYTHON=${PYTHON:-python3}
PYTHON=$(command -v "$PYTHON") || { echo "check: PYTHON is not an interpreter"; exit 77; }
"$PYTHON" -c 'import launcher, torch' 2>/dev/null ||
    { echo "check: $PYTHON has no shardrun; set PYTHON to one that has"; exit 77; }
export PYTHON OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export SHARDRUN_CHECK="check-$$"
WORK=$(mktemp -d)
NUM_FAILED=0

GENERATE=(-m launcher task=generate dtype=float32 run_root="$WORK/outputs")
[ -n "${CHECKPOINT:-}" ] && GENERATE+=(checkpoint="$CHECKPOINT")
TEXT=("${GENERATE[@]}" prompt="${PROMPT-I love Beijing, because}"
    generation.max_new_tokens="${MAX_NEW_TOKENS:-20}")
# Long enough to be killed while it runs.
yes 'I love Beijing, because' | head -n 500 >"$WORK/prompts.txt"
LONG=("${GENERATE[@]}" prompts_file="$WORK/prompts.txt" generation.max_num_seqs=1
    generation.max_new_tokens=40 generation.ignore_eos=true)

free_port() {
    "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

verdict() { # NAME STATUS NOTE
    if [ "$2" = 0 ]; then
        echo "PASS $1 $3"
    else
        echo "FAIL $1 $3"
        NUM_FAILED=$((NUM_FAILED + 1))
        tail -n 8 "$WORK/err" | cut -c 1-300 | sed 's/^/     /'
    fi
}

# The pids of this check's ranks whose environment has the line $1; all of them without $1.
marked() {
    "$PYTHON" - "${1:-SHARDRUN_CHECK=$SHARDRUN_CHECK}" <<'P'
import os, sys
from pathlib import Path

wanted = {f"SHARDRUN_CHECK={os.environ['SHARDRUN_CHECK']}", sys.argv[1]}
for entry in Path("/proc").glob("[0-9]*"):
    try:
        words = (entry / "cmdline").read_text().split("\0")
        lines = (entry / "environ").read_text(errors="replace").split("\0")
    except OSError:
        continue
    if "python" in words[0] and words[1:3] == ["-m", "launcher"] and wanted <= set(lines):
        print(entry.name)
P
}

has_text() { # FILE: holds the text, once
    "$PYTHON" - "$1" "$WORK/reference" <<'P'
import sys

printed, reference = (open(path, encoding="utf-8").read() for path in sys.argv[1:])
sys.exit(not (reference.strip() in printed and printed.count("'text_generation_text'") == 1))
P
}

check() { # NAME COMMAND…
    local name=$1 start=$SECONDS status
    shift
    timeout 170 "$@" >"$WORK/out" 2>"$WORK/err" </dev/null
    status=$?
    [ $status = 0 ] && { has_text "$WORK/out" || status=other-text; }
    verdict "$name" "$status" "($((SECONDS - start)) s, status $status)"
}

check_kill() { # NAME VARIABLE=RANK COMMAND…
    local name=$1 line=$2 pid victim status note start=$SECONDS
    shift 2
    : >"$WORK/out"
    timeout 170 "$@" >"$WORK/out" 2>"$WORK/err" </dev/null &
    pid=$!
    until grep -q text_generation_text "$WORK/out" || ! kill -0 $pid 2>/dev/null; do sleep 0.1; done
    victim=$(marked "$line" | sed -n 1p)
    [ -n "$victim" ] || { kill $pid; wait $pid; verdict "$name" 1 "(no process of $line)"; return; }
    kill -KILL "$victim"
    start=$SECONDS
    wait $pid
    status=$?
    note="$((SECONDS - start)) s after the kill, status $status"
    while [ -n "$(marked)" ] && [ $((SECONDS - start)) -lt 20 ]; do sleep 0.2; done
    [ $status != 0 ] && [ $((SECONDS - start)) -lt 10 ] &&
        cat "$WORK/out" "$WORK/err" | grep -qi "pid $victim"
    verdict "$name" $? "($note)"
}

finish() {
    [ $NUM_FAILED = 0 ] && rm -rf "$WORK" || echo "logs: $WORK"
    [ $NUM_FAILED = 0 ]
}

if [ -n "${EXPECTED:-}" ]; then
    cp "$EXPECTED" "$WORK/reference"
else
    timeout 170 "$PYTHON" "${TEXT[@]}" parallel.tp=1 >"$WORK/reference" 2>"$WORK/err" </dev/null ||
        { echo "FAIL one plain rank"; cat "$WORK/err"; exit 1; }
fi
