# Whether a job is to go back into the queue, asked at its end: by the scripts in this folder, and by the jobs of
# launch/submit.py, which carry this file's text. Meant to be sourced.

# Slurm's name for this job. The last task of an array has the array's own number, which would mean all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Whether it is for this attempt to say what becomes of the job. It is not where the job was cancelled or requeued
# already; then it is no longer RUNNING, or RUNNING on another node that took over from this one.
is_in_charge() {
    local now=""
    for _ in 1 2 3 4 5 6; do  # the controller may be busy, or about to be back
        now=$(scontrol --oneliner show job "$job") && break || sleep 10
    done
    [ -n "$now" ] || echo "error: Slurm does not answer; submit job $job again to go on" >&2
    [[ $now == *" JobState=RUNNING "*" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

# Whether a step that ended with this exit code has ended for the loss of a node: something can be started on this one,
# but not on all. The ranks on the other nodes notice it, and end, minutes before Slurm does (SlurmdTimeout), which then
# would find the job failed and not requeue it.
has_lost_node() {
    case $1 in 0 | 2 | 75) return 1 ;; esac
    # Cancelled meanwhile, nothing can be started either, so who is in charge is asked last.
    [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && can_start --nodes=1 --nodelist="$SLURMD_NODENAME" &&
        ! can_start --nodes="$SLURM_JOB_NUM_NODES" && is_in_charge &&
        echo "a node of job $job does not answer" >&2
}

can_start() (
    for name in "${!SLURM_@}" "${!SRUN_@}"; do  # what the job's own steps are to have
        case $name in SLURM_CONF | SLURM_JOB_ID) ;; *) unset "$name" ;; esac
    done
    timeout --kill-after=5 40 srun --overlap --ntasks-per-node=1 "$@" true >/dev/null 2>&1
)
