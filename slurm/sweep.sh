#!/usr/bin/env bash
# A sweep as a Slurm array, one cell for each array task:
#
#   sbatch [options] slurm/sweep.sh SWEEP [key=value ...]
#   sbatch --gpus-per-node=1 --time=4:00:00 slurm/sweep.sh configs/sweeps/cifar100/communication.yaml
#
# Options, folder, environment, preemption and requeues are as in train.sh. All tasks of a job run its cell together.
# The job runs the first cell itself and submits an array with its own resources for the others, so that nothing is
# reserved just to count the cells. With `--array=0-5` given by hand it submits nothing, and every option of sbatch
# counts for every task, even those that a running job cannot look up (--signal, --mail-type, --output).
#
# A complete cell is skipped. A cell that fails stops no other, and sets the exit code of its task.
#
# A complete cell is skipped. A cell that fails stops no other cell; the exit code of its array task tells of it.
#
# A warning of the time limit between two cells would be missed, so no cell is begun within the last two and a half
# minutes. For another time than the two minutes of --signal, set SBATCH_SIGNAL=USR1@SECONDS. It counts for every task,
# and unlike an option, the job can see it.
#
#SBATCH --job-name=fedpeft-sweep
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
set -euo pipefail

# Slurm runs a copy of this file, in a folder of its own.
submitted=$(scontrol --oneliner show job "${SLURM_JOB_ID:?is not set; give this script to sbatch}" | sed -n '1s/.* Command=\([^ ]*\).*/\1/p')
repository=${FEDPEFT_REPOSITORY:-$(cd "$SLURM_SUBMIT_DIR" && dirname "$(dirname "$(realpath -m "$submitted")")")}
[ -r "$repository/slurm/job.sh" ] || { echo "error: no slurm/job.sh in '$repository'; set FEDPEFT_REPOSITORY" >&2; exit 2; }
source "$repository/slurm/job.sh"

asked() { squeue --noheader --jobs="$SLURM_JOB_ID" --format="$1"; }

# The options of sbatch that ask for this job's resources. Most are in its environment, the rest in the queue.
resources() {
    local option variable value
    while read -r option variable; do
        [ -z "${!variable:-}" ] || echo "--$option=${!variable}"
    done <<END
job-name SLURM_JOB_NAME
partition SLURM_JOB_PARTITION
account SLURM_JOB_ACCOUNT
qos SLURM_JOB_QOS
reservation SLURM_JOB_RESERVATION
nodes SLURM_JOB_NUM_NODES
ntasks SLURM_NTASKS
ntasks-per-node SLURM_NTASKS_PER_NODE
cpus-per-task SLURM_CPUS_PER_TASK
mem SLURM_MEM_PER_NODE
mem-per-cpu SLURM_MEM_PER_CPU
mem-per-gpu SLURM_MEM_PER_GPU
gpus SLURM_GPUS
gpus-per-task SLURM_GPUS_PER_TASK
ntasks-per-gpu SLURM_NTASKS_PER_GPU
END
    for option in time=%l gres=%b constraint=%f exclude=%x; do
        value=$(asked "${option#*=}")
        case $value in "" | N/A | "(null)") ;; *) echo "--${option%=*}=${value//gres[:\/]/}" ;; esac
    done
    [ "$(asked %h)" != NO ] || echo --exclusive
}

# Submits the array for all tasks but this one. The job's comment survives a requeue, so the array is submitted once.
submit_others() {
    local limit="" options array
    [[ $(asked %k) != *"array "* ]] || return 0
    mapfile -t options < <(resources)
    if [ "${FEDPEFT_MAX_TASKS:-0}" = 1 ]; then
        options+=(--dependency="afterany:$SLURM_JOB_ID")
    fi
    [ "${FEDPEFT_MAX_TASKS:-0}" = 0 ] || limit=%$((FEDPEFT_MAX_TASKS > 1 ? FEDPEFT_MAX_TASKS - 1 : 1))
    array=$(
        for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done  # they describe this job
        sbatch --parsable --array="1-$((tasks - 1))$limit" "${options[@]}" "$repository/slurm/sweep.sh" "$@"
    ) || fail "the array for the other cells cannot be submitted from here; give sbatch --array=0-$((tasks - 1))"
    scontrol update jobid="$SLURM_JOB_ID" comment="array $array"
    echo "$cells cells in $tasks tasks: the first runs here, the others in the array $array"
}

[ $# -gt 0 ] || fail "usage: sbatch [options] slurm/sweep.sh SWEEP [key=value ...]"
per_task=${FEDPEFT_CELLS_PER_TASK:-1}
[[ $per_task =~ ^[1-9][0-9]*$ ]] || fail "FEDPEFT_CELLS_PER_TASK: '$per_task' is no number from 1 up"
[[ ${FEDPEFT_MAX_TASKS:-0} =~ ^[0-9]+$ ]] || fail "FEDPEFT_MAX_TASKS: '$FEDPEFT_MAX_TASKS' is no number"
listing=$(fedpeft sweep list "$@" --json) || exit $?
cells=$(grep -o '"index":' <<<"$listing" | wc -l)
tasks=$(((cells + per_task - 1) / per_task))
first=$((${SLURM_ARRAY_TASK_ID:-0} * per_task))
[ $first -lt "$cells" ] || fail "there is no array task $SLURM_ARRAY_TASK_ID; the $cells cells make tasks 0 to $((tasks - 1))"
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ] && [ $tasks -gt 1 ]; then
    limit=$(scontrol show config | sed -n 's/^MaxArraySize *= *//p')
    [ $tasks -le "$limit" ] || fail "the $cells cells make $tasks tasks, but an array here has $limit at most; set" \
        "FEDPEFT_CELLS_PER_TASK to $(((cells + limit - 1) / limit)) or more"
    submit_others "$@"
fi

# Whether the warning of the time limit may have come since the last cell ended. Slurm looks at limits every 30 s, and
# warns ahead of the look that would be late; a step needs 5 s to start. Half of the time is used in any case, so that a
# job with a short limit also gets beyond the complete cells.
is_late() {
    local end left margin=155
    [[ ! ${SBATCH_SIGNAL:-} =~ @([0-9]+)$ ]] || margin=$((10#${BASH_REMATCH[1]} + 35))
    end=$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$job" --format=%e) || return 1
    [[ $end =~ ^[0-9]+$ ]] || return 1  # the job has no time limit
    left=$((end - $(date +%s)))
    [ $left -lt $margin ] && [ $left -lt $SECONDS ]
}

worst=0
for ((cell = first; cell < first + per_task && cell < cells; cell++)); do
    if [ $cell -gt $first ] && is_late; then
        echo "cell $cell is left to the next attempt: the time limit is near" >&2
        finish 75
    fi
    code=0
    step sweep run "$@" --index $cell || code=$?
    case $code in
    0) ;;
    75 | 138 | 143) finish $code ;;
    *)
        ! has_lost_node $code || finish 75
        echo "cell $cell ended with exit code $code" >&2
        worst=$code
        ;;
    esac
done
finish $worst
