#!/usr/bin/env bash
# Submits a command to Slurm, on any number of nodes, as a job that goes on over time limits and lost nodes.
#
#   launch/slurm.sh --gpus-per-node=8 [--nodes=4] [options] -- python -m eqvae_jax.main --config=... --workdir=DIR
#
#   --nodes=1  --gpus-per-node=G    G may be 0; the job uses your allocation's hours
#   --cpus-per-gpu=8                cores for each GPU (without GPUs: for each node); Slurm would give one
#   --partition=P  --account=A  --time=24:00:00  --name=eqvae
#   --per-gpu                       one process a GPU; without, one a node, which drives all its GPUs
#   --warn=300                      seconds before the time limit at which the run is told to save; then the job requeues
#   --requeues=50  --restarts=3     at most so many; restarts are those within one allocation, after a failure
#   --container=IMAGE  --mounts=A:B pyxis' --container-image and --container-mounts (of this checkout in any case). For
#                                   Apptainer the command itself is apptainer exec --nv IMAGE.sif python -m ...
#   --venv=DIR                      entered first (default .venv of this checkout, if there is one, and no container)
#   --logs=runs/slurm               the job's log is there, in JOB.log
#   --sbatch=FLAG                   any other flag of sbatch, as often as needed: --sbatch=--qos=high
#   --dry-run                       prints the command, submits nothing
#
# This checkout and the workdir must be where every node sees them. Afterwards: squeue --me, scancel JOB (the run saves
# and is not requeued), tail -F runs/slurm/JOB.log.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/functions.sh

dry='' nodes=1 gpus='' cpus=8 partition='' account='' time=24:00:00 name=eqvae per_gpu='' warn=300
requeues=50 restarts=3 container='' mounts='' venv='' logs=runs/slurm extra=() command=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --nodes=*) nodes=$(number "$1") ;;
    --gpus-per-node=*) gpus=$(number "$1") ;;
    --cpus-per-gpu=*) cpus=$(number "$1") ;;
    --partition=*) partition="${1#*=}" ;;
    --account=*) account="${1#*=}" ;;
    --time=*) time="${1#*=}" ;;
    --name=*) name="${1#*=}" ;;
    --per-gpu) per_gpu=yes ;;
    --warn=*) warn=$(number "$1") ;;
    --requeues=*) requeues=$(number "$1") ;;
    --restarts=*) restarts=$(number "$1") ;;
    --container=*) container="${1#*=}" ;;
    --mounts=*) mounts="${1#*=}" ;;
    --venv=*) venv="${1#*=}" ;;
    --logs=*) logs="${1#*=}" ;;
    --sbatch=*) extra+=("${1#*=}") ;;
    --dry-run) dry=yes ;;
    --) shift; command=("$@"); break ;;
    *) die "unknown option $1; every option is --flag=value, and the command goes after --" ;;
  esac
  shift
done
[ ${#command[@]} -gt 0 ] || die "there is no command: it goes after -- (--help says more)"
[ -n "$gpus" ] || die "--gpus-per-node=G is needed (0 for none)"
[ "$nodes" -ge 1 ] || die "--nodes is at least 1"
[ "$cpus" -ge 1 ] || die "--cpus-per-gpu is at least 1"
[ -z "$per_gpu" ] || [ "$gpus" -ge 1 ] || die "--per-gpu needs --gpus-per-node"
[ "$warn" -ge 1 ] && [ "$warn" -le 65535 ] || die "--warn is 1 to 65535 seconds"
[ -z "$mounts" ] || [ -n "$container" ] || die "--mounts belongs to --container"
for word in "${command[@]}"; do
  [[ "$word" != *gs://* ]] || die "$word: the run writes to directories that all nodes see, not to addresses"
done
need sbatch "submit from a login node of the cluster"

tasks=1 share=$((gpus > 0 ? gpus * cpus : cpus))
if [ -n "$per_gpu" ]; then tasks=$gpus share=$cpus; fi
[ "$gpus" -eq 0 ] || extra=(--gpus-per-node="$gpus" "${extra[@]}")
[ -z "$partition" ] || extra+=(--partition="$partition")
[ -z "$account" ] || extra+=(--account="$account")
job=(--gpus="$gpus" --requeues="$requeues" --restarts="$restarts" --logs="$logs")
[ -z "$venv" ] || job+=(--venv="$venv")
[ -z "$container" ] || job+=(--container="$container")
[ -z "$mounts" ] || job+=(--mounts="$mounts")
[ -z "$per_gpu" ] || job+=(--per-gpu)

perform mkdir -p "$logs"
# USR1 goes to the batch script alone: it knows then that time is up, and a scancel (TERM) is told apart from it.
perform sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$tasks" --cpus-per-task="$share" --time="$time" \
  --signal=B:USR1@"$warn" --requeue --open-mode=append --output="$logs/%j.log" --chdir="$PWD" "${extra[@]}" \
  launch/slurm_job.sh "${job[@]}" -- "${command[@]}"
