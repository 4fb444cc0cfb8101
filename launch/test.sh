#!/usr/bin/env bash
# Makes or reuses a virtual environment, installs the package with its test dependencies, and runs the whole test suite,
# two files at a time (WORKERS=N: so many; each takes up to 4 GB).
#
#   launch/test.sh [pytest arguments ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh "[test]"
exec python -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile "$@"
