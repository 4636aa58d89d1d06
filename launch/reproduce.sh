#!/usr/bin/env bash
# Runs the paper's experiments 1, 2, 3 and 5 on the two offline tasks, digits and glyphs100, and reports on them.
#
#   ./launch/reproduce.sh [workers]      one worker a core, where not told otherwise; results in runs/offline
#
# Cells that are complete are not run again: after an interruption the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh ""

export OMP_NUM_THREADS=1
workers=${1:-$(env -u OMP_NUM_THREADS nproc)}  # nproc would count the threads just set
tenth=runs/offline/glyph_vit_tenth.safetensors
[ -f "$tenth" ] || "$PYTHON" -m fedpeft_dist pretrain --steps 600 --output "$tenth"

work() {
    local worst=0 code
    for data in digits glyphs100; do
        for experiment in communication stability scale pretraining slower; do
            code=0
            "$PYTHON" -m fedpeft_dist sweep run "configs/sweeps/offline/$data/$experiment.yaml" || code=$?
            [ $code != 75 ] || return 75  # interrupted: the same command goes on
            [ $code = 0 ] || worst=$code
        done
    done
    return $worst
}
started=$SECONDS
pids=()
set -m  # a process group for each worker, so that a signal reaches what it runs
for _ in $(seq "$workers"); do
    work &
    pids+=($!)
    sleep 1  # two workers that start as one would build the same cell, and one of them would find it taken
done
set +m
trap 'for pid in "${pids[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done; wait; exit 143' INT TERM
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
echo "the sweeps took $((SECONDS - started)) s with $workers workers"
for data in digits glyphs100; do
    for experiment in communication stability scale pretraining slower; do
        "$PYTHON" -m fedpeft_dist report "runs/offline/$data/$experiment"
    done
done
[ $status = 0 ] && "$PYTHON" launch/compare_hypotheses.py
exit $status
