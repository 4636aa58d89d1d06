#!/usr/bin/env bash
# Prepares an environment and sets PYTHON, so it is meant to be sourced. It prints nothing but pip's output.
#
#   source launch/setup.sh [extras]      extras: "test", "sharding", or nothing
#
# It uses FEDPEFT_VENV if that is set, else the active virtual environment, else .venv in the repository, which it
# makes.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${FEDPEFT_VENV:-${VIRTUAL_ENV:-$repository/.venv}}
extras=${1:-}

if [ ! -x "$venv/bin/python" ]; then
    echo "setting up $venv"
    python3 -m venv "$venv"
fi
PYTHON=$venv/bin/python

# An environment that has all imports of this package and its tests is used as it is, with this repository's package.
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
needed="import fedpeft_dist.cli, fedpeft_dist.federation.run, fedpeft_dist.reports.report, sklearn, submitit, tensorboard, h5py"
[ "$extras" = test ] && needed="$needed, pytest, pytest_timeout, xdist, hypothesis, importlinter, ruff, datasets, peft, selenium, onnx, onnxscript, onnxruntime"
[ -n "$extras" ] && needed="$needed; from importlib.metadata import version; version('deepspeed')"
if ! (cd / && "$PYTHON" -c "$needed") 2>/dev/null; then
    echo "installing fedpeft_dist into $venv (a few minutes the first time: PyTorch is large)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile --editable "$repository${extras:+[$extras]}"
    # On all cores, where pip would use one. Files that are no Python of this version, such as templates, are left.
    installed=$("$PYTHON" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    "$PYTHON" -m compileall -q -j 0 "$installed" >/dev/null 2>&1 || true
fi
export PYTHON
