#!/usr/bin/env bash
# TPU VMs of Google Cloud, one host or a pod: asks for one, runs this checkout on all its hosts, gives it back.
#
#   launch/tpu.sh create NAME --zone=ZONE --type=v5litepod-16 [--spot]   joins the queue, perhaps for hours
#   launch/tpu.sh run    NAME --zone=ZONE [--bucket=BUCKET --mount=/DIR] -- python -m eqvae_jax.main --workdir=/DIR/RUN ...
#   launch/tpu.sh attach NAME --zone=ZONE [--worker=0]            follows the log; Ctrl-C does nothing to the command
#   launch/tpu.sh status NAME --zone=ZONE                         of the TPU, and of the command on each host
#   launch/tpu.sh stop   NAME --zone=ZONE                         the command saves and ends; the TPU stays
#   launch/tpu.sh delete NAME --zone=ZONE [--yes]
#   launch/tpu.sh watch  NAME --zone=ZONE --type=TYPE [--spot] [--bucket=BUCKET --mount=/DIR] [--then-delete] -- COMMAND
#                        create and run, and both again whenever the TPU is taken away, until the command ended with 0;
#                        Ctrl-C ends the watching alone
#
# An ACTIVE TPU costs money until it is deleted, whether something runs on it or not.
#
#   --spot            cheaper, and may be taken away at any time     --project=P       gcloud's own without
#   --direct          without the queue, at once or not at all (on every command for that TPU)
#   --version=V       runtime version; without, the one that Google names for the type's generation
#   --gcloud=FLAG     more flags of gcloud's create, --ssh=FLAG of its ssh and scp: --ssh=--tunnel-through-iap
#   --clone=URL       the hosts clone the current commit from there; without, it is copied to them
#   --restarts=20     at most, of the command on a host after a failure that another try may mend, and as many of watch's
#   --pause=60        seconds before watch's first restart, doubled at each to 16 times; --poll=30 seconds between looks
#   --dry-run         prints the commands, runs none
#
# Hosts share no disk: checkpoints and metrics go to a bucket, mounted on all of them as --mount. What is sent is the
# current commit, without uncommitted changes. Logs and environment are in ~/eqvae of each host.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/functions.sh

dry='' zone='' project='' type='' version='' spot='' direct='' bucket='' mount='' clone='' worker=0 yes='' then_delete=''
restarts=20 pause=60 poll=30 extra=() ssh=() command=()
case "${1:-}" in
  create | run | watch | attach | status | stop | delete) action="$1" ;;
  -h | --help) usage; exit 0 ;;
  *) die "the first argument is create, run, watch, attach, status, stop or delete (--help says more)" ;;
esac
name="${2:-}"
case "$name" in -h | --help) usage; exit 0 ;; esac
[[ "$name" =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  die "'$name' is not a name for a TPU: small letters, digits and hyphens, a letter first"
shift 2
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --spot) spot=yes ;;
    --direct) direct=yes ;;
    --gcloud=*) extra+=("${1#*=}") ;;
    --ssh=*) ssh+=("${1#*=}") ;;
    --bucket=*) bucket="${1#*=}" ;;
    --mount=*) mount="${1#*=}" ;;
    --clone=*) clone="${1#*=}" ;;
    --worker=*) worker="${1#*=}" ;;
    --restarts=*) restarts=$(number "$1") ;;
    --pause=*) pause=$(number "$1") ;;
    --poll=*) poll=$(number "$1") ;;
    --yes) yes=yes ;;
    --then-delete) then_delete=yes ;;
    --dry-run) dry=yes ;;
    --) shift; command=("$@"); break ;;
    *) die "unknown option $1; every option is --flag=value, and the command goes after --" ;;
  esac
  shift
done

[ -n "$zone" ] || die "--zone=ZONE is needed"
where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
case "$action" in
  create | watch)
    [ -n "$type" ] || die "--type=TYPE is needed, such as v5litepod-16 or v6e-8"
    if [ -z "$version" ]; then
      case "$type" in
        v6e-*) version=v2-alpha-tpuv6e ;;
        v5p-*) version=v2-alpha-tpuv5 ;;
        v5litepod-*) version=v2-alpha-tpuv5-lite ;;
        v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
        *) die "which runtime $type needs is not known here: name it with --version" ;;
      esac
    fi
    ;;
esac
case "$action" in
  run | watch)
    [ ${#command[@]} -gt 0 ] || die "there is no command: it goes after --"
    for word in "${command[@]}"; do
      [[ "$word" != *gs://* ]] || die "$word: the run writes to directories; mount the bucket with --bucket and --mount"
    done
    [ -z "$bucket" ] || [[ "$bucket" =~ ^[a-z0-9][-_.a-z0-9]*$ ]] || die "--bucket is a name, without gs://"
    [ -z "$bucket$mount" ] || { [ -n "$bucket" ] && [[ "$mount" = /?* ]]; } ||
      die "--bucket=NAME and --mount=/DIR, an absolute path, go together"
    [ -n "$bucket" ] || say "without --bucket the hosts share no directory: right for a TPU of one host only"
    need git "the hosts get a commit"
    commit=$(git rev-parse --verify HEAD) || die "this is not a git checkout"
    git diff --quiet HEAD -- || say "uncommitted changes are not sent: the hosts get commit ${commit:0:10}"
    ;;
  *) [ ${#command[@]} -eq 0 ] || die "$action takes no command" ;;
esac
need gcloud "https://cloud.google.com/sdk/docs/install, then gcloud init"
if [ -n "$direct" ]; then kind=tpu-vm; else kind=queued-resources; fi

request() {
  say "asking for $type${spot:+ (spot)}; once ACTIVE it costs money until: launch/tpu.sh delete $name --zone=$zone"
  local more=("${where[@]}" --accelerator-type="$type")
  [ -z "$spot" ] || more+=(--spot)
  if [ -n "$direct" ]; then
    perform gcloud compute tpus tpu-vm create "$name" "${more[@]}" --version="$version" "${extra[@]}"
  else
    perform gcloud compute tpus queued-resources create "$name" --node-id="$name" "${more[@]}" \
      --runtime-version="$version" "${extra[@]}"
  fi
}

give_back() {
  local more=(--quiet)
  [ -n "$direct" ] || more+=(--force)  # with its TPU, which else must be deleted first
  perform gcloud compute tpus "$kind" delete "$name" "${where[@]}" "${more[@]}"
}

look() {  # sets state: gcloud's, a VM's in the words of the queue, ABSENT, or UNKNOWN where gcloud cannot tell
  local field=state.state answer
  [ -z "$direct" ] || field=state
  if answer=$(gcloud compute tpus "$kind" describe "$name" "${where[@]}" --format="value($field)" 2>&1); then
    state="${answer##*$'\n'}"
    case "$state" in READY) state=ACTIVE ;; PREEMPTED | TERMINATED) state=SUSPENDED ;; esac
  elif grep -qi 'not.found' <<<"$answer"; then
    state=ABSENT
  else
    state=UNKNOWN
    printf '%s\n' "$answer" >&2
  fi
}

wait_for_active() {
  while [ -z "$dry" ]; do
    look
    case "$state" in
      ACTIVE) break ;;
      ABSENT) die "there is no $name in $zone: launch/tpu.sh create" ;;
      SUSPENDED | FAILED) die "$name is $state: launch/tpu.sh delete, then create (watch does both by itself)" ;;
    esac
    say "$name is $state"
    sleep "$poll"
  done
}

on_all() {  # a line for the shell of each host
  perform gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1" "${ssh[@]}"
}

worker() {  # worker ACTION [ARGUMENTS]: launch/tpu_worker.sh on each host
  on_all "eqvae/source/launch/tpu_worker.sh $(quoted "$@")"
}

deploy() {  # the commit, its environment, the bucket, and the command's start; fails with the first that fails
  local archive="build/eqvae-${commit:0:10}.tar.gz" put
  local renew="if [ -e eqvae/source/launch/tpu_worker.sh ]; then eqvae/source/launch/tpu_worker.sh idle; fi && "
  renew+="mkdir -p eqvae && rm -rf eqvae/source && "
  if [ -n "$clone" ]; then
    put="git clone --quiet -- $(quoted "$clone") eqvae/source && git -C eqvae/source checkout --quiet $commit"
  else
    put="mkdir eqvae/source && tar -xzf eqvae.tar.gz -C eqvae/source"
    perform mkdir -p build &&
      perform git archive --format=tar.gz --output="$archive" "$commit" &&
      perform gcloud compute tpus tpu-vm scp "$archive" "$name:eqvae.tar.gz" "${where[@]}" --worker=all "${ssh[@]}" ||
      return 1
  fi
  on_all "$renew$put" &&
    worker install &&
    { [ -z "$bucket" ] || worker mount "$bucket" "$mount"; } &&
    worker start --restarts="$restarts" -- "${command[@]}"
}

census() {  # sets lines, of tpu_worker.sh status; fails where a host cannot be reached
  local answer
  answer=$(worker status 2>&1) || { tail -n 3 <<<"$answer" >&2; return 1; }
  lines=$(grep -o 'eqvae [^ ]* \(none\|running\|ended\|stopped\|asked\|lost\)\( [0-9]*\)\?' <<<"$answer") || return 1
}

judge() {  # from lines: verdict is finished, busy, again, asked, or the code of a failure that a person must mend
  local running='' others='' zero='' asked='' word value
  verdict=''
  while read -r _ _ word value; do
    case "$word" in
      running) running=yes ;;
      asked) asked=yes ;;
      ended)
        if [ "$value" -eq 0 ]; then zero=yes
        elif [ "$value" -eq 75 ] || { [ "$value" -ge 128 ] && [ "$value" -ne 130 ]; }; then others=yes
        else verdict=$value; fi
        ;;
      *) others=yes ;;  # lost with its machine, or told to end by it
    esac
  done <<<"$lines"
  if [ -n "$verdict" ]; then :
  elif [ -n "$asked" ] && [ -z "$running" ]; then verdict=asked
  elif [ -n "$others" ]; then verdict=again
  elif [ -n "$running" ]; then verdict=busy
  elif [ -n "$zero" ]; then verdict=finished
  else verdict=again; fi
}

finish() {  # finish CODE: watch ends
  if [ -n "$then_delete" ]; then give_back; else
    say "$name still costs money: launch/tpu.sh delete $name --zone=$zone"
  fi
  exit "$1"
}

again() {  # again REASON: counts a restart and waits; gives up after too many
  [ $((SECONDS - begun)) -lt 3600 ] || failures=0  # an hour of work: it was not this that failed
  if [ "$failures" -ge "$restarts" ]; then
    say "$1; $restarts restarts did not help"
    finish 75
  fi
  local seconds=$((pause << (failures < 4 ? failures : 4)))
  failures=$((failures + 1))
  say "$1; restart $failures of $restarts in $seconds s"
  sleep "$seconds"
  begun=$SECONDS
}

watch() {
  failures=0 begun=$SECONDS
  local started='' suspect=0
  look
  [ "$state" != UNKNOWN ] || die "gcloud cannot tell whether there is a $name"
  if [ "$state" = ACTIVE ] && census && grep -q ' running' <<<"$lines"; then
    started=yes
    say "a command runs on $name already: watching that one"
  fi
  while true; do
    look
    case "$state" in
      ABSENT)
        started=''
        if ! request; then again "gcloud refused"; fi
        ;;
      SUSPENDED | FAILED)
        started=''
        again "$name is $state"
        give_back || say "it could not be deleted; once more later"
        ;;
      ACTIVE)
        if [ -z "$started" ]; then
          if deploy; then started=yes suspect=0; else worker end || true; again "the command did not start"; fi
          continue
        fi
        if census; then judge; else verdict=unreachable; fi
        # A host that is being taken away still answers, and says that its command stopped: look twice.
        case "$verdict" in
          busy) suspect=0 ;;
          finished) say "finished"; finish 0 ;;
          asked) say "stopped, as asked"; finish 0 ;;
          again | unreachable)
            suspect=$((suspect + 1))
            if [ "$suspect" -gt 2 ]; then
              printf '%s\n' "${lines:-}" >&2
              worker end || true
              again "the command is not running everywhere"
              started=''
            fi
            ;;
          *)
            printf '%s\n' "$lines" >&2
            worker end || true
            on_all 'tail -n 40 eqvae/log' || true
            say "the command failed with $verdict, which another try does not mend"
            finish "$verdict"
            ;;
        esac
        ;;
      UNKNOWN) again "gcloud does not answer" ;;
      *) say "$name is $state" ;;
    esac
    sleep "$poll"
  done
}

case "$action" in
  create) request ;;
  run)
    wait_for_active
    deploy
    say "it runs; launch/tpu.sh attach $name --zone=$zone follows it"
    ;;
  watch)
    if [ -n "$dry" ]; then
      request
      deploy
      worker status
      say "and when it is SUSPENDED or FAILED, deleted and all of it again:"
      give_back
    else
      watch
    fi
    ;;
  attach)
    perform gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$worker" \
      --command='tail -n 100 -F eqvae/log' "${ssh[@]}"
    ;;
  status)
    if [ -n "$dry" ]; then
      perform gcloud compute tpus "$kind" describe "$name" "${where[@]}"
      worker status
    else
      look
      echo "$name $state"
      [ "$state" != ACTIVE ] || worker status
    fi
    ;;
  stop) worker stop ;;
  delete)
    if [ -z "$dry$yes" ]; then
      [ -t 0 ] || die "delete $name in $zone? Say --yes"
      read -r -p "delete the TPU $name in $zone, and all that is on its disks? [y/N] " answer
      [[ "$answer" = [yY]* ]] || die "nothing was deleted"
    fi
    give_back
    ;;
esac
