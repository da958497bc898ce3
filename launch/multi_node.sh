#!/usr/bin/env bash
# Trains on several nodes: run this on every one of them, with the same variables and arguments.
#
#   NNODES=2 RDZV_ENDPOINT=node0:29400 RUN_ID=first \
#     launch/multi_node.sh launch/train.py --task digits --out /shared/runs/first
#
# NNODES          how many nodes take part
# RDZV_ENDPOINT   HOST:PORT of one of them, where they meet
# RUN_ID          name of the job: the same on all nodes, and the same again to continue the job;
#                 every other job needs another name
# NPROC_PER_NODE  processes per node; auto is one per GPU, without GPUs one per core (default: auto)
# MAX_RESTARTS    how often the processes start again after one died; then the job ends (default: 3)
# LOCAL_ADDR      this node's address, where its host name is not one that the others can reach
# PYTHON          the interpreter (default: python)
#
# The folder given to --out must be on a file system that all nodes share.
set -eu
for name in NNODES RDZV_ENDPOINT RUN_ID; do
  [ -n "${!name:-}" ] || { echo "multi_node.sh: set $name; the head of $0 says what to" >&2; exit 2; }
done
[ $# -gt 0 ] || { echo "multi_node.sh: name a script, such as launch/train.py" >&2; exit 2; }

# Without this, processes that are restarted would connect to the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="$NNODES" \
  --nproc-per-node="${NPROC_PER_NODE:-auto}" \
  --max-restarts="${MAX_RESTARTS:-3}" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$RDZV_ENDPOINT" \
  --rdzv-id="$RUN_ID" \
  ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} \
  "$@"
