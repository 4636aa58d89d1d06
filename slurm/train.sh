#!/usr/bin/env bash
# One run as a Slurm job, on any number of nodes and GPUs:
#
#   sbatch [options] slurm/train.sh CONFIG [key=value ...]
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 --time=12:00:00 \
#       slurm/train.sh configs/paper/cifar100/bias.yaml
#
# Ask for as many tasks as GPUs: each task is a rank, with a GPU of its own. Give partition, account, time and so on to
# sbatch, as options or as SBATCH_* variables. The job runs in the folder where sbatch was called; paths in a config are
# relative to it. A job that is preempted, requeued, warned of its time limit or left by a node goes on by itself from
# its last checkpoint. `scancel --signal=USR1 JOB` sends a job back to the queue. The log is one file for all attempts.
# The warning comes two minutes ahead of the limit, or up to half a minute sooner. A job needs several times that to
# make progress, or a later warning (--signal=USR1@30). It reads these variables:
#
#   FEDPEFT_SETUP        a file to source first, on every attempt: modules and the like
#   FEDPEFT_VENV         a virtual environment; without it the one active at sbatch, else .venv in the repository, else
#                        the first `python` on the PATH
#   FEDPEFT_RUN          a prefix for python, such as "apptainer exec --nv image.sif"; python is then the image's own
#   FEDPEFT_MAX_REQUEUES how often a job goes back into the queue, for any reason (100); then it ends with code 75
#   FEDPEFT_REPOSITORY   this repository, if Slurm cannot tell which script was submitted
#   OMP_NUM_THREADS      by default the CPUs of a task
#
#SBATCH --job-name=fedpeft
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
set -euo pipefail

# Slurm runs a copy of this file, in a folder of its own.
submitted=$(scontrol --oneliner show job "${SLURM_JOB_ID:?is not set; give this script to sbatch}" | sed -n '1s/.* Command=\([^ ]*\).*/\1/p')
repository=${FEDPEFT_REPOSITORY:-$(cd "$SLURM_SUBMIT_DIR" && dirname "$(dirname "$(realpath -m "$submitted")")")}
[ -r "$repository/slurm/job.sh" ] || { echo "error: no slurm/job.sh in '$repository'; set FEDPEFT_REPOSITORY" >&2; exit 2; }
source "$repository/slurm/job.sh"

[ $# -gt 0 ] || fail "usage: sbatch [options] slurm/train.sh CONFIG [key=value ...]"
code=0
step train "$@" || code=$?
finish $code
