# The common part of train.sh and sweep.sh, which source it with `repository` set: a job's Python, its steps, and its
# end. train.sh describes the variables that it reads.

fail() { echo "error: $*" >&2; exit 2; }

source "$repository/slurm/requeue.sh"

max_requeues=${FEDPEFT_MAX_REQUEUES:-100}
[[ $max_requeues =~ ^[0-9]+$ ]] || fail "FEDPEFT_MAX_REQUEUES: '$max_requeues' is no number"

if [ -n "${FEDPEFT_SETUP:-}" ]; then
    [ -r "$FEDPEFT_SETUP" ] || fail "FEDPEFT_SETUP: '$FEDPEFT_SETUP' cannot be read"
    set +eu  # the site's file is written for interactive shells
    source "$FEDPEFT_SETUP"
    set -eu
fi
read -ra python <<<"${FEDPEFT_RUN:-}"
if [ -n "${FEDPEFT_VENV:-}" ]; then
    python+=("$FEDPEFT_VENV/bin/python")
elif [ ${#python[@]} = 0 ] && [ -n "${VIRTUAL_ENV:-}" ]; then
    python+=("$VIRTUAL_ENV/bin/python")
elif [ ${#python[@]} = 0 ] && [ -x "$repository/.venv/bin/python" ]; then
    python+=("$repository/.venv/bin/python")
else
    python+=(python)  # the container's, or the first one on the PATH that FEDPEFT_SETUP has set
fi
command -v "${python[0]}" >/dev/null ||
    fail "no ${python[0]} on $(uname -n); FEDPEFT_VENV, FEDPEFT_SETUP and FEDPEFT_RUN say where Python is"

export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Since Slurm 22.05, srun no longer takes the CPUs of a task from the job.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# The signal that ends a job also reaches this shell, which stays to see how its step ends.
trap : TERM

fedpeft() { "${python[@]}" -m fedpeft_dist "$@"; }

# Runs a command of fedpeft on all tasks of the job. Each task must see all GPUs of the job on its node, and takes the
# one of its local rank. So nothing may bind tasks to GPUs. (In some versions, --gpu-bind=none would hide which GPUs are
# the job's.) When one task has ended, the others have a minute to end by themselves: killing them at once would turn
# their exit codes into that of a signal.
step() (
    unset SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_TRES_PER_TASK SLURM_GPU_BIND
    exec srun --export=ALL --kill-on-bad-exit=0 --wait=60 "${python[@]}" -m fedpeft_dist "$@"
)

# Ends the job with its step's exit code. If the run was interrupted or a node was lost, Slurm starts the job again. The
# number of starts is limited, because a round that takes longer than an attempt would never end. 138 and 143 mean that
# USR1 or TERM came while Python was still starting.
finish() {
    local goes_on=
    case $1 in
    75 | 138 | 143) is_in_charge && goes_on=yes ;;
    *) has_lost_node "$1" && goes_on=yes ;;
    esac
    if [ -n "$goes_on" ]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_requeues" ]; then
            echo "error: job $job was requeued $max_requeues times, which is all that FEDPEFT_MAX_REQUEUES allows;" \
                "if it gets nowhere, give it more --time or a later --signal; submit it again to go on" >&2
            exit 75
        fi
        scontrol requeue "$job" || echo "error: job $job cannot be requeued; submit it again to go on" >&2
    fi
    exit "$1"
}
