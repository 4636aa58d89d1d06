# Decides at the end of a job whether it goes back into the queue. The scripts in this folder source this file, and the
# jobs of launch/submit.py carry its text.

# Slurm's name for this job. The last task of an array has the number of the array itself, and that means all its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Whether this attempt decides about the job. It does not if the job was already cancelled or requeued. Such a job is no
# longer RUNNING, or is RUNNING on another node that took over from this one.
is_in_charge() {
    local now=""
    for _ in 1 2 3 4 5 6; do  # the controller may be busy or restarting
        now=$(scontrol --oneliner show job "$job") && break || sleep 10
    done
    [ -n "$now" ] || echo "error: Slurm does not answer; submit job $job again to go on" >&2
    [[ $now == *" JobState=RUNNING "*" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

# Whether a step with this exit code ended because a node was lost. In that case a step can be started on this node, but
# not on all nodes. The ranks on the other nodes notice the loss and end minutes before Slurm notices it
# (SlurmdTimeout). Slurm would then find the job failed and not requeue it.
has_lost_node() {
    case $1 in 0 | 2 | 75) return 1 ;; esac
    # In a job that was cancelled meanwhile, nothing can be started either. So is_in_charge is asked last.
    [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && can_start --nodes=1 --nodelist="$SLURMD_NODENAME" &&
        ! can_start --nodes="$SLURM_JOB_NUM_NODES" && is_in_charge &&
        echo "a node of job $job does not answer" >&2
}

can_start() (
    for name in "${!SLURM_@}" "${!SRUN_@}"; do  # these are meant for the job's own steps
        case $name in SLURM_CONF | SLURM_JOB_ID) ;; *) unset "$name" ;; esac
    done
    timeout --kill-after=5 40 srun --overlap --ntasks-per-node=1 "$@" true >/dev/null 2>&1
)
