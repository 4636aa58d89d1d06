# Decides at a job's end whether the job goes back into the queue. The scripts in this folder source it; the jobs of
# launch/submit.py carry its text.

# Slurm's name for this job. One task of an array has the array's own number, which would mean all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Whether this attempt decides what becomes of the job. It does not if the job was cancelled or requeued already: then
# the job is no longer RUNNING, or RUNNING on another node that took over from this one.
is_in_charge() {
    local now=""
    for _ in 1 2 3 4 5 6; do  # the controller may be busy or restarting
        now=$(scontrol --oneliner show job "$job") && break || sleep 10
    done
    [ -n "$now" ] || echo "error: Slurm does not answer; submit job $job again to go on" >&2
    [[ $now == *" JobState=RUNNING "*" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

# Whether a step that ended with this exit code has lost a node: a program can be started on this node, but not on all.
# The ranks on the other nodes notice the loss, and end, minutes before Slurm does (SlurmdTimeout). Slurm would then
# find the job failed and not requeue it.
has_lost_node() {
    case $1 in 0 | 2 | 75) return 1 ;; esac
    # In a job that was cancelled meanwhile nothing can be started either, so is_in_charge comes last.
    [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && can_start --nodes=1 --nodelist="$SLURMD_NODENAME" &&
        ! can_start --nodes="$SLURM_JOB_NUM_NODES" && is_in_charge &&
        echo "a node of job $job does not answer" >&2
}

can_start() (
    for name in "${!SLURM_@}" "${!SRUN_@}"; do  # they describe the job's own steps
        case $name in SLURM_CONF | SLURM_JOB_ID) ;; *) unset "$name" ;; esac
    done
    timeout --kill-after=5 40 srun --overlap --ntasks-per-node=1 "$@" true >/dev/null 2>&1
)
