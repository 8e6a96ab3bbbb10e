#!/usr/bin/env bash
# The arguments of MindFormers' run_llama2_predict.sh, then prompts: shardrun generates.
set -euo pipefail

readonly NAME=${0##*/}
readonly USAGE="usage: $NAME PARALLEL CONFIG_PATH CKPT_PATH [DEVICE_NUM] [PROMPT ...]"
readonly HELP="$USAGE

  PARALLEL     single: one rank, whatever MS_* variables are set; parallel: DEVICE_NUM ranks
  CONFIG_PATH  a MindFormers predict YAML, or a shardrun YAML
  CKPT_PATH    the checkpoint
  DEVICE_NUM   parallel: the number of ranks, needed; single: may be left out, and is not used
  PROMPT       taken as it is; none: the three prompts of MindFormers' script

With single, a fourth argument that is empty or all digits is DEVICE_NUM, else the first PROMPT; a
PROMPT of digits needs a DEVICE_NUM before it."

fail() {
  printf '%s: %s\n%s\n' "$NAME" "$1" "$USAGE" >&2
  exit 2
}

# A stale MS_WORKER_NUM in the shell must not turn a single run into a parallel one.
drop_mindspore_variables() {
  local name dropped=''
  for name in $(compgen -e); do
    case $name in
      MS_* | RANK_ID | RANK_SIZE | DEVICE_ID)
        unset "$name"
        dropped+=", $name"
        ;;
    esac
  done
  if [[ -n $dropped ]]; then
    printf '%s: single does not use %s; dropped.\n' "$NAME" "${dropped#, }" >&2
  fi
}

# Several prompts as one Hydra list, quoted by its rules: a quote gets a backslash, and backslashes
# before a quote are doubled. A temporary file would have another name in every rank where srun or
# mpirun starts this script, and ranks whose configurations differ are refused.
list_of() {
  "$python" -I - "$@" << 'END'
import os, re, sys

def quote(text):
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"

sys.stdout.buffer.write(os.fsencode("[" + ",".join(map(quote, sys.argv[1:])) + "]"))
END
}

if [[ ${1-} == -h || ${1-} == --help ]]; then
  printf '%s\n' "$HELP"
  exit 0
fi
[[ ${1-} == single || ${1-} == parallel ]] ||
  fail "PARALLEL must be single or parallel, but is '${1-}'; give one of them first."
(($# >= 3)) || fail "$1 needs CONFIG_PATH and CKPT_PATH; give both."
[[ -f $2 ]] || fail "CONFIG_PATH must be a YAML file, but '$2' is none; correct the path."
[[ -e $3 ]] || fail "CKPT_PATH must exist, but '$3' does not; correct the path."
mode=$1 config=$2 checkpoint=$3
shift 3

if [[ $mode == parallel ]]; then
  [[ ${1-} =~ ^[1-9][0-9]*$ ]] ||
    fail "DEVICE_NUM must be a positive integer, but is '${1-}'; parallel needs the number of ranks."
  tp=$1
  shift
else
  tp=1
  drop_mindspore_variables
  if (($#)) && [[ $1 =~ ^[0-9]*$ ]]; then
    shift
  fi
fi
(($#)) || set -- 'I love Beijing, because' 'LLaMA is a' 'Huawei is a company that'

python=$(command -v python || command -v python3) ||
  fail 'python must be on PATH, but is not; activate the environment that has shardrun.'
if command -v shardrun > /dev/null; then
  program=(shardrun)
else
  # From a checkout that is not installed.
  root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  program=("$python" -m launcher)
fi

if (($# == 1)); then
  prompts="prompt=$1"
else
  prompts="prompts=$(list_of "$@")"
fi
# The program takes this shell's place: signals reach it, and its exit status is ours.
exec "${program[@]}" generate "config=$config" "checkpoint=$checkpoint" "parallel.tp=$tp" "$prompts"
