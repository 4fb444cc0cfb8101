#!/usr/bin/env bash
# Installs this checkout on a Colab runtime, for whichever accelerator it has, and shows what JAX sees. In a cell:
#
#   !git clone --depth 1 REPOSITORY eqvae_jax && bash eqvae_jax/launch/colab.sh
#   %cd eqvae_jax
#
#   launch/colab.sh [gpu | tpu]     fails, saying what to change, where the runtime has not that accelerator
#   launch/colab.sh --dry-run       prints the commands, runs none
#
# PYTHON names another interpreter than python3. Works on any machine whose Python is 3.11 or newer.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/functions.sh

dry='' wanted=''
for argument in "$@"; do
  case "$argument" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry=yes ;;
    gpu | tpu) wanted="$argument" ;;
    *) die "unknown argument $argument: gpu, tpu, --dry-run" ;;
  esac
done
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$python is older than 3.11: Runtime > Change runtime type > the latest runtime version, or name another with PYTHON="

found=cpu extra=''
if gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null) && [ -n "$gpu" ]; then
  found=gpu driver="${gpu%%$'\n'*}"
  driver="${driver##*, }"
  # CUDA 13 needs driver 580; runtimes with an older one run CUDA 12.
  if [ "${driver%%.*}" -ge 580 ]; then extra='[cuda]'; else extra='[cuda12]'; fi
  say "GPU: ${gpu//$'\n'/; }"
elif compgen -G "${DEVICES:-/dev}/accel[0-9]*" >/dev/null || compgen -G "${DEVICES:-/dev}/vfio/[0-9]*" >/dev/null; then
  found=tpu extra='[tpu]'
  say "TPU"
else
  say "no GPU and no TPU: a CPU, which is enough for the quickstart"
fi
change='Runtime > Change runtime type > Hardware accelerator'
[ -z "$wanted" ] || [ "$wanted" = "$found" ] ||
  die "this runtime has a $found, not a $wanted: $change, then run this cell again (what is on its disk is lost)"

perform "$python" -m pip install --quiet --disable-pip-version-check --editable ".$extra"
# A new process: a notebook keeps the JAX that it imported before.
seen=$(perform "$python" -c 'import jax; print(jax.__version__, jax.default_backend(), jax.local_device_count())') || {
  say "JAX did not start: Runtime > Disconnect and delete runtime, then run this cell again"
  exit 1
}
if [ -n "$dry" ]; then
  printf '%s\n' "$seen"
  exit 0
fi
read -r version backend count <<<"$seen"
echo "JAX $version: $count x $backend"
if [ "$backend" != "$found" ]; then
  say "the runtime has a $found, but JAX runs on $backend: another process, perhaps this notebook, may hold it:"
  say "Runtime > Restart session, then run this cell again before anything imports jax"
  exit 1
fi
say "if this notebook has imported jax before: Runtime > Restart session"
