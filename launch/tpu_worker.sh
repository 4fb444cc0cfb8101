#!/usr/bin/env bash
# On each worker of a TPU VM, what launch/tpu.sh asks for. Everything is in ~/eqvae: source (this checkout), venv, log,
# state (of the command), stop (there, if a person asked it to stop).
#
#   tpu_worker.sh install                       Python 3.12 and the package with its tpu extra, into ~/eqvae/venv
#   tpu_worker.sh mount BUCKET DIR              the bucket as a directory, with gcsfuse
#   tpu_worker.sh start [--restarts=N] -- COMMAND   in the background, in ~/eqvae/source
#   tpu_worker.sh status                        one line: eqvae HOST none | running PID | ended CODE | stopped CODE | lost
#   tpu_worker.sh idle                          fails if the command runs
#   tpu_worker.sh stop                          SIGTERM to the command: it saves and ends
#   tpu_worker.sh end                           the same, not as a person's wish; waits, and kills it in the end
set -euo pipefail
home="$(cd "$(dirname "$0")/../.." && pwd)"
cd "$home"
# shellcheck source=launch/functions.sh
source source/launch/functions.sh

look() {  # sets word and value
  word=none value=
  [ ! -e state ] || read -r word value <state
  if [ "$word" = running ] && ! grep -qs processes.py "/proc/$value/cmdline"; then
    word=lost value=  # with the machine, or killed: nothing wrote its end
  fi
}

end_within() {  # end_within SECONDS: whether the command ended
  for ((i = 0; i < 5 * $1; i++)); do
    look
    [ "$word" = running ] || return 0
    sleep 0.2
  done
  return 1
}

action="${1:-}"
[ $# -eq 0 ] || shift
case "$action" in
  install)
    stamp="venv/.installed-$(cksum <source/setup.py | cut -d' ' -f1)"
    if [ ! -e "$stamp" ]; then
      export PATH="$HOME/.local/bin:$PATH"
      command -v uv >/dev/null || python3 -m pip install --quiet --user uv
      [ -x venv/bin/python ] || uv venv --quiet --python 3.12 venv  # the VM's own Python is 3.10
      uv pip install --quiet --python venv/bin/python --editable "source[tpu]"
      touch "$stamp"
    fi
    ;;
  mount)
    bucket="$1" directory="$2"
    if mountpoint -q "$directory"; then
      [ "$(findmnt -n -o SOURCE "$directory")" = "$bucket" ] || die "$directory is the mount of something else"
      exit 0
    fi
    if ! command -v gcsfuse >/dev/null; then
      packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/gcsfuse.asc
      curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
      echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      sudo apt-get -qq update
      sudo apt-get -qq install gcsfuse
    fi
    sudo mkdir -p "$directory"
    sudo chown "$(id -u):$(id -g)" "$directory"
    # A checkpoint is finished by renaming its directory, which a bucket without hierarchical namespace does object by
    # object and gcsfuse refuses without a limit; and hosts must see each other's files at once, which caches (without
    # end, on such machines) would keep from them.
    gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
      --metadata-cache-negative-ttl-secs=0 "$bucket" "$directory"
    ;;
  start)
    look
    [ "$word" != running ] || die "a command runs already (process $value): launch/tpu.sh stop"
    rm -f state stop
    # 8476: JAX's own port for the coordinator, 8482 since 0.8.1, is not among those that TPU VMs open to each other.
    export PATH="$home/venv/bin:$PATH" JAX_COORDINATOR_PORT="${JAX_COORDINATOR_PORT:-8476}" PYTHONUNBUFFERED=1
    cd source
    # nohup: when a VM is taken away its sessions get SIGTERM and SIGHUP, and the second would end the save.
    nohup setsid python launch/processes.py 1 --state="$home/state" "$@" >>"$home/log" 2>&1 </dev/null &
    for ((i = 0; i < 100; i++)); do
      [ ! -e "$home/state" ] || exit 0
      sleep 0.1
    done
    tail -n 20 "$home/log" >&2
    die "the command did not start on $(hostname)"
    ;;
  status)
    look
    [ "$word" != stopped ] || [ ! -e stop ] || word=asked
    echo "eqvae $(hostname) $word $value"
    ;;
  idle)
    look
    [ "$word" != running ] || die "a command runs on $(hostname): launch/tpu.sh stop, and status until it ended"
    ;;
  stop)
    touch stop
    look
    [ "$word" != running ] || kill -TERM "$value"
    ;;
  end)
    look
    [ "$word" = running ] || exit 0
    kill -TERM "$value"
    end_within "${EQVAE_END:-60}" || { pkill -KILL -P "$value" || true; end_within 10; }
    ;;
  *) usage >&2; exit 2 ;;
esac
