#!/usr/bin/env bash
# Federates a small pre-trained ViT on handwritten digits, by every method, over two processes; then one table.
#
#   ./launch/quickstart.sh               results in runs/quickstart; what is complete there is not run again
#
# On a machine with CUDA devices each process takes one (two share it where there is only one).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

export OMP_NUM_THREADS=1
for method in head bias norm prompt adapter lora full scratch; do
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 \
        -m fedpeft_dist train "configs/quickstart/$method.yaml"
done
"$PYTHON" -m fedpeft_dist report runs/quickstart
