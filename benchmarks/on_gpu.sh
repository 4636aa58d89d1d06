#!/usr/bin/env bash
# Shows all that a GPU has to show, in one command of at most 8 minutes, and writes it into one JSON file:
#
#     benchmarks/on_gpu.sh [on_gpu.json] [--device cpu --small]
#
# It needs PyTorch, timm, numpy, safetensors, PyYAML and pydantic; the package itself need not be installed. The file is
# written anew after each part, so that a run that is cut short has shown what it had. `--device cpu --small` is a trial
# of the script itself with tiny sizes. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
file=on_gpu.json
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    file=$1
    shift
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec timeout --signal=INT --kill-after=5 475 "${PYTHON:-python3}" benchmarks/on_gpu.py --output "$file" "$@"
