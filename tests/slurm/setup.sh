#!/usr/bin/env bash
# Starts a real SLURM with one node, this machine, for tests/slurm/check.sh. Needs root on Debian.
#
#   tests/slurm/setup.sh start | stop
#
# It installs slurm-wlm and writes /etc/slurm/slurm.conf. Whoever is on this machine can run jobs as
# anyone (auth/none): for a container or a machine that is thrown away.
set -eu
case "${1:-}" in
  start)
    command -v slurmctld > /dev/null || apt-get install -qq -y --no-install-recommends slurm-wlm > /dev/null
    name=$(hostname -s)
    mkdir -p /etc/slurm /var/spool/slurmctld /var/spool/slurmd
    cat > /etc/slurm/slurm.conf << END
ClusterName=here
SlurmctldHost=$name(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
KillWait=5
NodeName=$name NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    slurmctld
    slurmd
    for _ in $(seq 60); do
      [ "$(sinfo -h -o %T 2> /dev/null)" = idle ] && exit 0
      sleep 0.5
    done
    echo "setup.sh: SLURM has not come up; see /var/log/slurmctld.log and /var/log/slurmd.log" >&2
    exit 1
    ;;
  stop)
    for daemon in slurmd slurmctld; do
      [ -f "/run/$daemon.pid" ] && kill "$(cat "/run/$daemon.pid")"
    done
    ;;
  *)
    echo "setup.sh: start or stop" >&2
    exit 2
    ;;
esac
