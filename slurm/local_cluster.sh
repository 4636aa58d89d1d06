#!/usr/bin/env bash
# Starts a real Slurm of two nodes on this machine, for tests and trials. It needs root, slurm-wlm and munge.
#
#   slurm/local_cluster.sh start|stop|status
#
# All its files lie in FEDPEFT_CLUSTER (by default fedpeft-slurm in the folder for temporary files), and `stop` removes
# them. Clusters in different folders can run side by side. The nodes n1 and n2 offer four CPUs each, whatever the
# machine has. Jobs in the partition `urgent` preempt those in the default one, `batch`, which are requeued.
#
# Tests may kill the daemon of a node (its process id stands in n1.pid) and start it again: `slurmd -N n1`.
set -euo pipefail

folder=$(realpath -m "${FEDPEFT_CLUSTER:-${TMPDIR:-/tmp}/fedpeft-slurm}")
export SLURM_CONF=$folder/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin

fail() { echo "error: $*" >&2; exit 1; }

# Finds three free ports in a row, below those that the kernel hands out.
free_ports() {
    local port=$((10000 + $$ % 3000 * 3))
    while (for i in 0 1 2; do : <"/dev/tcp/127.0.0.1/$((port + i))" && exit 0; done; exit 1) 2>/dev/null; do
        port=$((port + 3))
    done
    echo "$port"
}

# Slurm's defaults are for large clusters; the short times here make tests quick. A requeued job waits until its
# credential has expired (cred_expire). A node without its daemon is noticed after SlurmdTimeout. Each cluster numbers
# its jobs from another number, so that the jobs of two clusters on this machine use different ports.
write_config() {
    local port=$1 host
    host=$(uname -n)
    host=${host%%.*}
    cat >"$SLURM_CONF" <<END
ClusterName=fedpeft
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket,ttl=60,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
FirstJobId=$port
JobRequeue=1
KillWait=15
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=6
InactiveLimit=0
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4 RealMemory=8000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4 RealMemory=8000
PartitionName=batch Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=15 OverSubscribe=NO
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
END
}

start() {
    local program
    for program in munged slurmctld slurmd sinfo; do
        command -v $program >/dev/null || fail "$program is missing; install slurm-wlm and munge"
    done
    [ "$(id -u)" = 0 ] || fail "Slurm's daemons start jobs for others, so this needs root"
    [ ! -e "$folder" ] || fail "$folder exists: a cluster runs there, or is left there; slurm/local_cluster.sh stop"
    mkdir -p "$folder/state"
    trap 'stop; fail "one of the daemons cannot be started"' ERR
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    write_config "$(free_ports)"
    munged --force --num-threads=2 --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    slurmctld
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 150); do
        if [ "$(sinfo --noheader --partition=batch --states=idle --format=%D 2>/dev/null)" = 2 ]; then
            echo "two nodes are ready; to use them: export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    tail -n 5 "$folder"/*.log >&2
    stop
    fail "the nodes are not ready after 30 s; the end of their logs stands above"
}

status() {
    [ -e "$SLURM_CONF" ] && timeout 10 sinfo 2>/dev/null || fail "no cluster runs in $folder"
}

# Lists the cluster's processes: its daemons, and the processes of its jobs. Both have the path of its configuration in
# their environment, but so has every process that merely talks to the cluster.
processes() {
    local process
    for process in /proc/[0-9]*; do
        { grep -qzxF "SLURM_CONF=$SLURM_CONF" "$process/environ" || continue; } 2>/dev/null
        if [[ $(readlink "$process/exe") == */sbin/* ]] || grep -qz '^SLURM_JOB_ID=' "$process/environ"; then
            echo "${process#/proc/}"
        fi
    done
}

stop() {
    [ -e "$folder/munge.key" ] || fail "no cluster runs in $folder"
    timeout 5 scancel --user=root 2>/dev/null || true
    for _ in $(seq 25); do
        [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break
        sleep 0.2
    done
    while pids=$(processes) && [ -n "$pids" ]; do
        kill -KILL $pids 2>/dev/null || true
        sleep 0.1
    done
    rm -rf "$folder"
}

case ${1:-} in
start | stop | status) "$1" ;;
*) fail "usage: slurm/local_cluster.sh start|stop|status" ;;
esac
