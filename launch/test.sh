#!/usr/bin/env bash
# Makes or reuses a virtual environment, installs the package with its test dependencies, and runs the whole test suite.
#
#   launch/test.sh [pytest arguments ...]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh "[test]"
exec python -m pytest "$@"
