#!/usr/bin/env bash
# Trains on several nodes under SLURM. From the root of the repository:
#
#   sbatch --nodes=4 launch/slurm.sh launch/train.py --task digits --out /shared/runs/first
#
# An example: fit the lines below to your cluster. One torchrun per node starts a process per GPU. A
# job that is requeued keeps its number, and train.py continues it from its newest checkpoint.
#SBATCH --job-name=gq-triton
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu
cd "$SLURM_SUBMIT_DIR" # SLURM runs a copy of this file that lies elsewhere
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES="$SLURM_JOB_NUM_NODES"
# Jobs that share a node need ports of their own.
export RDZV_ENDPOINT="$first:$((20000 + SLURM_JOB_ID % 10000))"
export RUN_ID="slurm-$SLURM_JOB_ID"
# If one node's torchrun ends, the job cannot go on: end the others too, so that SLURM can requeue.
exec srun --kill-on-bad-exit=1 launch/multi_node.sh "$@"
