#!/usr/bin/env bash
# Federates a small pre-trained ViT on handwritten digits, by every method, then prints one table.
#
#   ./launch/quickstart.sh               results in runs/quickstart; complete runs there are not run again
#
# A GPU, or a core of the CPU, takes one run at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh ""

methods=(full scratch bias norm prompt adapter lora head)  # the longest first
configs=("${methods[@]/#/configs/quickstart/}")
"$PYTHON" launch/sweep.py "${configs[@]/%/.yaml}"
"$PYTHON" -m fedpeft_dist report runs/quickstart
