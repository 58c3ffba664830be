#!/bin/bash
# A Slurm cluster of two nodes on this machine, for the tests: real daemons, each node with its own network, no systemd.
#
#   tests/cluster/cluster.sh install           Debian's packages, where they are not installed and root may do so
#   tests/cluster/cluster.sh missing           prints what keeps a cluster from starting here; nothing when nothing does
#   tests/cluster/cluster.sh start FOLDER      then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/cluster/cluster.sh stop FOLDER
#
# Needs root and Debian's slurm-wlm, munge and iproute2. All that it writes is in FOLDER, except a marked block in
# /etc/hosts, a bridge and two network namespaces, which `stop` removes.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
action=$1 folder=$(realpath -m "${2:-.}")
conf=$folder/slurm.conf
subnet=10.177.78 bridge=ftbridge prefix=ftnode port=17700

programs_missing() {
    local program
    for program in slurmctld slurmd srun munged ip nsenter unshare; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

install() { # never fails: what cannot be installed is a reason to skip the tests, not to fail them
    [[ -n $(programs_missing) ]] || return 0
    if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
        echo "cluster.sh: Slurm is not installed, and only root on Debian can install it here" >&2
        return 0
    fi
    export DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -qq -o Acquire::http::Timeout=20 -o Acquire::Retries=1) # no network: minutes less to find out
    { "${apt[@]}" update && "${apt[@]}" install --yes --no-install-recommends slurm-wlm munge iproute2; } >&2 ||
        echo "cluster.sh: apt-get could not install slurm-wlm, munge and iproute2" >&2
}

missing() {
    local programs
    programs=$(programs_missing)
    if [[ $EUID -ne 0 ]]; then
        echo "a Slurm cluster is started by root"
    elif [[ -n $programs ]]; then
        echo "not installed: ${programs//$'\n'/, } (apt-get install slurm-wlm munge iproute2)"
    elif ! unshare --net --uts true 2>/dev/null || ! ip link add ftprobe type bridge 2>/dev/null; then
        echo "this machine allows no network namespaces and bridges, with which two nodes are told apart"
    else
        ip link del ftprobe
    fi
}

alive() { # a process that has ended may still wait for init to take note of it
    [[ -d /proc/$1 ]] && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null
}

pids_in() { cat "$folder"/run/"$1".pid 2>/dev/null || true; }

stop() {
    if [[ -f $conf ]]; then
        export SLURM_CONF=$conf
        timeout 10 scancel --signal=KILL --full --user=root 2>/dev/null || true
        timeout 10 scancel --user=root 2>/dev/null || true
        for _ in {1..50}; do
            [[ -n $(timeout 5 squeue --noheader 2>/dev/null) ]] || break
            sleep 0.2
        done
    fi
    local name pid
    for name in slurmd.${prefix}1 slurmd.${prefix}2 slurmctld munged; do
        for pid in $(pids_in "$name"); do
            kill "$pid" 2>/dev/null || continue
            for _ in {1..80}; do
                alive "$pid" || break
                sleep 0.1
            done
        done
    done
    for i in 1 2; do
        ip link del "$prefix$i" 2>/dev/null || true # a process that is left would keep the network, and with it the name
        ip netns del "$prefix$i" 2>/dev/null || true
    done
    ip link del "$bridge" 2>/dev/null || true
    # In place: in a container /etc/hosts is a mount, which cannot be replaced.
    local hosts
    hosts=$(sed '/^# BEGIN fine-tuning test cluster$/,/^# END fine-tuning test cluster$/d' /etc/hosts)
    printf '%s\n' "$hosts" >/etc/hosts
}

start() {
    mkdir -p "$folder"/{munge,run,log,ctld,spool}
    chmod 755 "$folder" "$folder/run"
    chmod 711 "$folder/munge" # munged wants others to be able to enter
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge/key")

    echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf" # loaded though unused; the default is fatal without cgroups
    # Logs are named by the job: numbers that no cluster before had, but ports (by the last digits) that are always the same.
    local first_job=$(($(date +%s) / 60 % 3000 * 20000 + 1))
    cat >"$conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)($subnet.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/ctld
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
PropagateResourceLimits=NONE
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
MinJobAge=86400
FirstJobId=$first_job
KillWait=20
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=${prefix}1 NodeAddr=$subnet.11 Port=$((port + 1)) CPUs=8 RealMemory=16000 State=UNKNOWN
NodeName=${prefix}2 NodeAddr=$subnet.12 Port=$((port + 1)) CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes=${prefix}[1-2] Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=${prefix}[1-2] PriorityTier=10 State=UP
CONF
    {
        echo "# BEGIN fine-tuning test cluster"
        for i in 1 2; do echo "$subnet.1$i $prefix$i"; done
        echo "# END fine-tuning test cluster"
    } >>/etc/hosts

    ip link add "$bridge" type bridge
    ip addr add "$subnet.1/24" dev "$bridge"
    ip link set "$bridge" up
    for i in 1 2; do
        ip netns add "$prefix$i"
        ip link add "$prefix$i" type veth peer name eth0 netns "$prefix$i"
        ip link set "$prefix$i" master "$bridge" up
        ip -n "$prefix$i" link set lo up
        ip -n "$prefix$i" addr add "$subnet.1$i/24" dev eth0
        ip -n "$prefix$i" link set eth0 up
    done

    # Daemons start with an empty environment: nothing of an enclosing job reaches the jobs of the tests.
    daemon() { env -i PATH="$PATH" LANG=C.UTF-8 "$@" </dev/null >>"$folder/log/start.log" 2>&1; }
    daemon munged --force --num-threads=10 --socket="$folder/munge/socket" --key-file="$folder/munge/key" \
        --pid-file="$folder/run/munged.pid" --seed-file="$folder/munge/seed" --log-file="$folder/log/munged.log"
    daemon slurmctld -f "$conf"
    # shellcheck disable=SC2016 # the inner shell expands
    # Not `ip netns exec`: that hides /sys/fs/cgroup. Each node has its own host name, as gloo looks its address up.
    for i in 1 2; do
        mkdir -p "$folder/spool/$prefix$i"
        daemon nsenter --net="/run/netns/$prefix$i" unshare --uts \
            sh -c 'hostname "$1" && shift && exec "$@"' sh "$prefix$i" slurmd -f "$conf" -N "$prefix$i"
    done
    for _ in {1..200}; do
        if [[ $(SLURM_CONF=$conf timeout 5 sinfo -h -N -p main -o %T 2>/dev/null | grep -c '^idle$') == 2 ]]; then
            return 0
        fi
        sleep 0.1
    done
    echo "cluster.sh: the nodes are not ready after 20 s" >&2
    grep -hE 'error|fatal' "$folder"/log/*.log | tail -n 10 >&2
    return 1
}

case $action in
    install) install ;;
    missing) missing ;;
    start) stop && { start || { stop; exit 1; }; } ;;
    stop) stop ;;
    *) echo "cluster.sh: expected install, missing, start or stop, got $action" >&2 && exit 2 ;;
esac
