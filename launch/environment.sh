# Sourced by the scripts beside it, with the extras to install ("" or "[test]"): enters VENV (default .venv), made if
# need be, and installs this checkout into it unless that was done since setup.py last changed.
extras="$1"
venv="${VENV:-.venv}"
if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=...")'
  "${PYTHON:-python3}" -m venv "$venv"
fi
# shellcheck source=/dev/null
source "$venv/bin/activate"
stamp="$venv/.installed${extras}-$(cksum <setup.py | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
  echo "installing eqvae_jax$extras into $venv"
  python -m pip install --quiet --disable-pip-version-check --editable ".$extras"
  touch "$stamp"
fi
