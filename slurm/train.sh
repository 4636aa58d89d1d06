#!/usr/bin/env bash
# One run as a Slurm job, on any number of nodes and GPUs:
#
#   sbatch [options] slurm/train.sh CONFIG [key=value ...]
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 --time=12:00:00 \
#       slurm/train.sh configs/paper/cifar100/bias.yaml
#
# Ask for as many tasks as GPUs: each task is a rank, with a GPU of its own. Give sbatch the partition, account, time
# and so on, as options or as SBATCH_* variables. The job runs in the folder where sbatch was called. Paths in a config
# are relative to that folder.
#
# A job goes on by itself from its last checkpoint when it is preempted, requeued, warned of its time limit, or loses a
# node. `scancel --signal=USR1 JOB` sends the job back to the queue. The log is one file for all attempts. The warning
# comes two minutes ahead of the limit, or up to half a minute sooner. Give a job several times that time, or a later
# warning (--signal=USR1@30); otherwise it gets nowhere.
#
# The job reads these variables of the environment:
#
#   FEDPEFT_SETUP        a file to source first, on every attempt: modules and the like
#   FEDPEFT_VENV         a virtual environment. The default is the one active at sbatch, else .venv in the repository,
#                        else the `python` on the path.
#   FEDPEFT_RUN          a command to put before python: "apptainer exec --nv image.sif". Python is then the image's.
#   FEDPEFT_MAX_REQUEUES how often a job goes back into the queue (100), for any reason. Then it ends with code 75.
#   FEDPEFT_REPOSITORY   this repository, if Slurm cannot tell which script was submitted
#   OMP_NUM_THREADS      by default the CPUs of a task
#
#SBATCH --job-name=fedpeft
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
set -euo pipefail

# Slurm runs a copy of this file, in a folder of its own. So ask Slurm for the path of the original.
submitted=$(scontrol --oneliner show job "${SLURM_JOB_ID:?is not set; give this script to sbatch}" | sed -n '1s/.* Command=\([^ ]*\).*/\1/p')
repository=${FEDPEFT_REPOSITORY:-$(cd "$SLURM_SUBMIT_DIR" && dirname "$(dirname "$(realpath -m "$submitted")")")}
[ -r "$repository/slurm/job.sh" ] || { echo "error: no slurm/job.sh in '$repository'; set FEDPEFT_REPOSITORY" >&2; exit 2; }
source "$repository/slurm/job.sh"

[ $# -gt 0 ] || fail "usage: sbatch [options] slurm/train.sh CONFIG [key=value ...]"
code=0
step train "$@" || code=$?
finish $code
