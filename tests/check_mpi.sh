#!/bin/bash
# shardrun under Open MPI's and MPICH's mpirun, whichever are installed.
#
#   PYTHON=… CHECKPOINT=… EXPECTED=… bash tests/check_mpi.sh
#
# Outside of CI: needs Debian's openmpi-bin or mpich, or both. Settings: tests/check_reference.sh.
# Exit 77: neither is there.

here=$(cd "$(dirname "$0")" && pwd)
openmpi=$(command -v mpirun.openmpi) mpich=$(command -v mpirun.mpich)
[ -n "$openmpi$mpich" ] ||
    { echo "check_mpi: neither mpirun.openmpi nor mpirun.mpich is installed"; exit 77; }
. "$here/check_reference.sh"

# A script between mpirun and the rank: mpirun's daemon is not the rank's parent.
printf '#!/bin/bash\n"$@"\nexit $?\n' >"$WORK/wrapper.sh"

if [ -n "$openmpi" ]; then
    launch=("$openmpi" --oversubscribe -n 2)
    [ "$(id -u)" = 0 ] && launch=("$openmpi" --allow-run-as-root --oversubscribe -n 2)
    check "Open MPI, two ranks" "${launch[@]}" "$PYTHON" "${TEXT[@]}"
    check "Open MPI, behind a script" "${launch[@]}" bash "$WORK/wrapper.sh" "$PYTHON" "${TEXT[@]}"
    check_kill "Open MPI, SIGKILL to rank 1" OMPI_COMM_WORLD_RANK=1 "${launch[@]}" "$PYTHON" "${LONG[@]}"
fi
if [ -n "$mpich" ]; then
    launch=("$mpich" -n 2)
    check "MPICH, two ranks" "${launch[@]}" "$PYTHON" "${TEXT[@]}"
    check "MPICH, behind a script" "${launch[@]}" bash "$WORK/wrapper.sh" "$PYTHON" "${TEXT[@]}"
    check_kill "MPICH, SIGKILL to rank 1" PMI_RANK=1 "${launch[@]}" "$PYTHON" "${LONG[@]}"
fi
finish
