#!/usr/bin/env bash
# Runs the paper's experiments on the two offline tasks, digits and glyphs100, and reports on them.
#
#   ./launch/reproduce.sh [workers]      one worker a core by default; results in runs/offline
#
# Complete cells are not run again: after an interruption, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh ""

workers=${1:-$(env -u OMP_NUM_THREADS nproc)}  # with OMP_NUM_THREADS, nproc would count threads
export OMP_NUM_THREADS=1
tenth=runs/offline/glyph_vit_tenth.safetensors
[ -f "$tenth" ] || "$PYTHON" -m fedpeft_dist pretrain --steps 600 --output "$tenth"

experiments=({digits,glyphs100}/{communication,stability,dropout,scale,privacy,pretraining,slower})
sweeps=("${experiments[@]/#/configs/sweeps/offline/}")
started=$SECONDS
"$PYTHON" launch/sweep.py "${sweeps[@]/%/.yaml}" --workers "$workers" &
sweep=$!
trap : INT                                # a terminal sends Ctrl-C to the sweep itself
trap 'kill -TERM $sweep 2>/dev/null || true' TERM
while :; do  # a signal ends `wait`, but not the sweep
    status=0
    wait $sweep || status=$?
    kill -0 $sweep 2>/dev/null || break
done
echo "the sweeps took $((SECONDS - started)) s with $workers workers"
[ $status -le 1 ] || exit $status
for experiment in "${experiments[@]}"; do
    "$PYTHON" -m fedpeft_dist report "runs/offline/$experiment"
done
[ $status = 0 ] && "$PYTHON" launch/compare_hypotheses.py
exit $status
