#!/usr/bin/env bash
# Runs launch/study_slurm.sh and launch/slurm.sh on a real SLURM (tests/slurm/setup.sh start).
#
#   tests/slurm/check.sh [PYTHON]
#
# A study whose job is warned of the time limit, then killed and submitted again must have the
# results.csv of one that ran here alone, byte for byte. A training under torchrun must finish.
set -eu
cd "$(dirname "$0")/../.."
export PYTHON="${1:-.venv/bin/python}"
PYTHON="$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")"
out=$(mktemp -d)
study=(--tasks lines-disc --arms sgdm gq-sgdm gq-sgdm-clusters --batch-sizes 4 16 --steps 20
  --trials 2 --tuning-seeds 2 --seeds 2)
records() { find "$out/slurm/trials" -name "*.json" 2> /dev/null | wc -l; }
until_records() { # at least $1, while job $2 is there
  while [ "$(records)" -lt "$1" ] && squeue -h -j "$2" 2> /dev/null | grep -q .; do sleep 0.2; done
}
submit() {
  sbatch --parsable --ntasks=2 --output="$out/log-%j" launch/study_slurm.sh "${study[@]}" --out "$out/slurm"
}
over() { while squeue -h -j "$1" 2> /dev/null | grep -q .; do sleep 0.5; done; }

echo "the study alone, here"
"$PYTHON" -m gq_triton.commands.cli study run "${study[@]}" --out "$out/alone" --jobs 2 > /dev/null
"$PYTHON" -m gq_triton.commands.cli study report "$out/alone" > /dev/null
total=$(find "$out/alone/trials" -name "*.json" | wc -l)

job=$(submit)
until_records 3 "$job"
scancel --batch --signal=USR1 "$job" # as SLURM does before the time limit
before=$(records)
# A job that queued itself again waits until SLURM has cleaned up, a minute or two.
until squeue -h -j "$job" -o %T | grep -q PENDING; do sleep 0.2; done
echo "warned of the time limit at $before of $total records: the job is queued again"
scontrol release "$job" 2> /dev/null || true
scontrol update jobid="$job" starttime=now 2> /dev/null || true
until_records $((before + 8)) "$job"
scancel --full --signal=KILL "$job"
scancel "$job"
over "$job"
echo "killed at $(records) of $total records"
[ "$(records)" -lt "$total" ] || { echo "check.sh: killed too late to show anything" >&2; exit 1; }
job=$(submit)
over "$job"
echo "resumed: $(records) of $total records"
"$PYTHON" -m gq_triton.commands.cli study report "$out/slurm" > /dev/null
cmp "$out/alone/results.csv" "$out/slurm/results.csv" || { cat "$out"/log-*; exit 1; }
echo "results.csv is the same byte for byte"

PATH="$(dirname "$PYTHON"):$PATH" sbatch --parsable --wait --nodes=1 --gpus-per-node=0 \
  --cpus-per-task=2 --output="$out/log-train" launch/slurm.sh \
  launch/train.py --task digits --epochs 1 --out "$out/train" > /dev/null || { cat "$out/log-train"; exit 1; }
grep -q '"world_size"' "$out/train/summary.json"
echo "launch/slurm.sh has trained"
rm -r "$out"
