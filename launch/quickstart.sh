#!/usr/bin/env bash
# Makes or reuses a virtual environment, installs the package, and runs the quickstart: a small SD-VAE trained on
# photographs, then fine-tuned with EQ-VAE and, as a control, plainly; ends with a table and runs/quickstart/report.html.
#
#   launch/quickstart.sh [--config.x.y=value ...]
#
# VENV and RUNS name other directories than .venv and runs; PYTHON another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh ""
exec python -m eqvae_jax.main --config=configs/eq_sdvae.py:quickstart --workdir="${RUNS:-runs}/quickstart" "$@"
