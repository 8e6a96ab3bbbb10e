#!/usr/bin/env bash
# shardrun-predict, from a checkout that need not be installed: the arguments of MindFormers'
# run_llama2_predict.sh, then prompts.
set -euo pipefail

# The program takes this shell's place: signals reach it, and its exit status is ours.
if command -v shardrun-predict > /dev/null; then
  exec shardrun-predict "$@"
fi
python=$(command -v python || command -v python3) || {
  echo "${0##*/}: python must be on PATH, but is not; activate the environment that has shardrun." >&2
  exit 2
}
root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# -P: a directory called launcher where the user is must not be taken for ours.
exec "$python" -P -m launcher.mindformers.predict "$@"
