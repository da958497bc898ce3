#!/usr/bin/env bash
# Runs a study on the nodes of a SLURM job. From the root of the repository:
#
#   sbatch --ntasks=64 launch/study_slurm.sh --config my.toml --out /shared/studies/first
#
# The arguments are those of `gq-triton study run`. An example: fit the lines below to your cluster.
# Each task is a worker that runs one trial at a time. Before the time limit the job stops, keeps
# what is finished and queues itself again, until the study is finished. Nothing is lost, either, if
# the job is cancelled or killed: submit the same line again.
#
# RESOURCES  what each worker has, for trials on GPUs or of several ranks: "GPU=1" beside
#            --gpus-per-task=1 and --device cuda, "CPU=4" beside --nproc-per-trial 4
# PYTHON     the interpreter (default: python)
#
# The folder given to --out must be on a file system that the job's nodes share with later jobs.
#SBATCH --job-name=gq-study
#SBATCH --ntasks=16
#SBATCH --cpus-per-task=1
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu
cd "$SLURM_SUBMIT_DIR" # SLURM runs a copy of this file that lies elsewhere
python="${PYTHON:-python}"
# Jobs that share a node need ports of their own.
address="tcp://$(hostname):$((20000 + SLURM_JOB_ID % 10000))"
export OMP_NUM_THREADS=1
# A trial that has lost this many workers is given up: nodes die, and then no trial is at fault.
export DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=20

"$python" -m distributed.cli.dask_scheduler --host "$address" --no-dashboard --no-jupyter &
scheduler=$!
# --kill-on-bad-exit=0: a worker that dies does not end the others.
srun --kill-on-bad-exit=0 "$python" -m distributed.cli.dask_worker "$address" \
  --nthreads 1 --no-dashboard --memory-limit 0 --death-timeout 120 \
  ${RESOURCES:+--resources "$RESOURCES"} &
workers=$!
trap 'kill $scheduler $workers 2> /dev/null || true' EXIT

"$python" -m gq_triton.commands.cli study run --scheduler "$address" "$@" &
study=$!
again=
trap 'again=yes; kill -TERM $study' USR1
status=0
wait $study || status=$?
if [ -n "$again" ]; then
  echo "study_slurm.sh: the time limit is near: queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
