#!/usr/bin/env bash
# The batch script that launch/slurm.sh submits; it runs on the job's first node, in the checkout.
#
# Starts the command on every node with srun, and decides what its end means: done, again in this allocation, again in
# another one (scontrol requeue, when the time limit came first), or a person must look.
#
# JAX finds coordinator, number and rank from Slurm's variables, and takes one GPU for each process (SLURM_LOCALID)
# unless JAX_LOCAL_DEVICE_IDS names others. So all of a node's are named where a process drives the whole node.
set -euo pipefail
source launch/functions.sh

gpus=0 requeues=0 restarts=0 logs=runs/slurm venv=.venv container='' mounts='' per_gpu='' pause="${EQVAE_PAUSE:-10}"
while [ "$1" != -- ]; do
  case "$1" in
    --gpus=*) gpus=$(number "$1") ;;
    --requeues=*) requeues=$(number "$1") ;;
    --restarts=*) restarts=$(number "$1") ;;
    --logs=*) logs="${1#*=}" ;;
    --venv=*) venv="${1#*=}" ;;
    --container=*) container="${1#*=}" ;;
    --mounts=*) mounts="${1#*=}" ;;
    --per-gpu) per_gpu=yes ;;
    *) die "unknown option $1" ;;
  esac
  shift
done
shift
if [ -z "$container" ] && [ -e "$venv/bin/activate" ]; then
  # shellcheck source=/dev/null
  source "$venv/bin/activate"
elif [ "$venv" != .venv ]; then
  die "$venv is not a virtual environment, or is not entered in a container"
fi

if [ -z "$per_gpu" ] && [ "$gpus" -gt 0 ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
# srun does not take it over from sbatch, and a task would have one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# The command itself is the task, nothing between: Slurm signals the task, and at some sites all its children too, and a
# command that hears SIGTERM twice stops without saving.
step=(srun --kill-on-bad-exit=1)
[ -z "$container" ] || step+=(--container-image="$container" --container-workdir="$PWD"
  --container-mounts="$PWD:$PWD${mounts:+,$mounts}")
step+=("$@")
errors="$logs/$SLURM_JOB_ID.errors"

time_is_up='' cancelled='' pid=''
stop() {  # SIGTERM to the tasks; on SIGTERM to itself srun would kill them
  [ -z "$pid" ] || scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null || true
}
trap 'time_is_up=yes; stop' USR1
trap 'cancelled=yes; stop' TERM

attempt() {  # one srun; sets code to its own, or to that of a task that failed for good
  # srun ends with the highest code of all tasks, and 75 is higher than 1: its messages have each. They are whole when
  # the pipe is done. Signals are this script's to understand: srun would end its tasks on them, and tee their log.
  { trap '' TERM USR1; "${step[@]}" 2>&1 >&3 | tee "$errors" >&2; } 3>&1 &
  pid=$!
  if [ -n "$time_is_up$cancelled" ]; then stop; fi  # the signal came before there was anything to tell
  while wait "$pid" && code=0 || code=$?; kill -0 "$pid" 2>/dev/null; do :; done  # a signal ends a wait early
  pid=''
  local number
  while read -r number; do
    if [ "$code" -ne 0 ] && ! restartable "$number"; then code=$number; fi
  done < <(sed -n 's/^srun: error: .*: Exited with exit code \([0-9]*\)$/\1/p' "$errors")
}

restartable() {
  [ "$1" -eq 75 ] || { [ "$1" -ge 128 ] && [ "$1" -ne 130 ]; }
}

failures=0
while true; do
  if [ -n "$time_is_up$cancelled" ]; then
    code=143  # the signal came in a pause
  else
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, requeued ${SLURM_RESTART_COUNT:-0} times: $(quoted "$@")"
    attempt
    say "ended with $code"
  fi
  if [ -n "$cancelled" ]; then
    exit "$code"
  elif [ -n "$time_is_up" ] && { [ "$code" -eq 0 ] || restartable "$code"; }; then
    # 0 may also mean that the run was done just then; a finished run, started again, ends at once.
    [ "${SLURM_RESTART_COUNT:-0}" -lt "$requeues" ] || die "time is up, and $requeues requeues were allowed"
    say "time is up: requeued"
    exec scontrol requeue "$SLURM_JOB_ID"
  elif [ "$code" -eq 0 ] || ! restartable "$code"; then
    exit "$code"
  elif [ "$failures" -ge "$restarts" ]; then
    say "$restarts restarts did not help"
    exit "$code"
  fi
  failures=$((failures + 1))
  say "restart $failures of $restarts in $pause s"
  sleep "$pause" &
  wait $! || true  # not in the foreground: a signal must not wait for it
  pause=$((pause * 2 < 300 ? pause * 2 : 300))
done
