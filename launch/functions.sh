# Sourced by the scripts beside it that reach other machines: how they explain themselves, refuse, and show commands.

usage() {  # the comment at the head of the script
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

say() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
}

need() {  # need TOOL WHERE_FROM: before anything is done; a dry run needs nothing
  [ -n "${dry:-}" ] || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}

quoted() {  # its arguments as one line that bash reads back as the same arguments
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
}

perform() {  # runs a command, or with --dry-run shows it
  if [ -n "${dry:-}" ]; then quoted "$@"; else "$@"; fi
}

number() {  # number FLAG=VALUE: the value, if it is a whole number
  [[ "${1#*=}" =~ ^[0-9]{1,9}$ ]] || die "${1%%=*} takes a whole number, not '${1#*=}'"
  printf '%d\n' "$((10#${1#*=}))"
}
