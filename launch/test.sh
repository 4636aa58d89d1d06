#!/usr/bin/env bash
# Sets up an environment if there is none, then runs linters, the check of the layers, and the tests.
#
#   ./launch/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh test

export OMP_NUM_THREADS=1
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$(dirname "$PYTHON")/lint-imports"
# Three at a time, because half of the tests mostly wait: for Slurm, for a browser, or for processes to start.
exec "$PYTHON" -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=15 "$@"
