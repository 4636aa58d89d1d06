#!/usr/bin/env bash
# Federates a small pre-trained ViT on handwritten digits, by every method, over two processes, then prints one table.
#
#   ./launch/quickstart.sh               results in runs/quickstart; complete runs there are not run again
#
# With a single CUDA device there is one process, because NCCL gives each process a device of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh ""

export OMP_NUM_THREADS=1
ranks=2
[ "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" != 1 ] || ranks=1
for method in head bias norm prompt adapter lora full scratch; do
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node $ranks \
        -m fedpeft_dist train "configs/quickstart/$method.yaml"
done
"$PYTHON" -m fedpeft_dist report runs/quickstart
