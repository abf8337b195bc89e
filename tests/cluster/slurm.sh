#!/usr/bin/env bash
# A Slurm on this machine alone, for the tests: two CPU nodes and one with a GPU, all of them virtual.
#   tests/cluster/slurm.sh up FOLDER      FOLDER holds its state and logs; packages are installed if they are missing
#   tests/cluster/slurm.sh down FOLDER
# Needs root and Debian or Ubuntu. The GPU is a device file that is none, but Slurm hands it out as it would a real one.
set -euo pipefail
command=$1 folder=$2
host=$(hostname -s)
nodes="cpu1 cpu2 gpu1"

stop() {
  local pid
  for file in "$folder"/run/*.pid; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2> /dev/null || true
    for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2> /dev/null || true
    rm -f "$file"
  done
}

if [ "$command" = down ]; then
  scancel --user=root 2> /dev/null || true
  stop
  rm -f /etc/slurm/slurm.conf /etc/slurm/gres.conf /etc/slurm/cgroup.conf
  exit
fi

missing=$(for package in slurmctld slurmd slurm-client munge; do dpkg -s $package > /dev/null 2>&1 || echo $package; done)
if [ -n "$missing" ]; then
  apt-get update -qq
  # shellcheck disable=SC2086  # a list
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing < /dev/null
fi
if [ -e /etc/slurm/slurm.conf ]; then
  echo "/etc/slurm/slurm.conf exists: this machine has a Slurm of its own, or a test's was not stopped" >&2
  exit 1
fi

mkdir -p "$folder"/{state,log,run} /etc/slurm /run/munge /var/log/munge
chown munge: /run/munge /var/log/munge
[ -e "$folder/gpu0" ] || mknod "$folder/gpu0" c 1 3
pgrep -x munged > /dev/null || runuser -u munge -- /usr/sbin/munged
for _ in $(seq 50); do munge -n 2> /dev/null | unmunge > /dev/null 2>&1 && break; sleep 0.1; done

# In /etc/slurm: the job step drops what the environment says of another place. Memory is enforced by looking at the
# processes, which needs no cgroups. The CPU nodes have as many cores as small machines do, so that few jobs run at once;
# the GPU node has what a training asks for, on paper.
cat > /etc/slurm/slurm.conf << CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
ReturnToService=2
MinJobAge=3600
KillWait=3
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
DefMemPerCPU=200
NodeName=cpu[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=2 RealMemory=16384
NodeName=gpu1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17003 CPUs=8 RealMemory=65536 Gres=gpu:1
PartitionName=cpu Nodes=cpu[1-2] Default=YES MaxTime=1-0 State=UP
PartitionName=gpu Nodes=gpu1 MaxTime=1-0 State=UP
CONF
echo "NodeName=gpu1 Name=gpu File=$folder/gpu0" > /etc/slurm/gres.conf
echo "CgroupAutomount=no" > /etc/slurm/cgroup.conf

slurmctld -i
for node in $nodes; do
  mkdir -p "$folder/spool.$node"
  slurmd -N "$node"
done
for _ in $(seq 200); do
  [ "$(sinfo --noheader --Node --format=%T 2> /dev/null | grep -c idle)" = 3 ] && exit
  sleep 0.1
done
sinfo --Node >&2
echo "the nodes are not up: see $folder/log" >&2
exit 1
