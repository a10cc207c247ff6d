#!/usr/bin/env bash
# Train on a SLURM cluster, one process per GPU.
#
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of train.py]
#
# Environment variables: GPUS (8 in total), GPUS_PER_NODE (8), CPUS_PER_TASK (5), PORT (29500),
# SRUN_ARGS (further arguments of srun) and PYTHON (the interpreter).
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [arguments of train.py]" >&2
    exit 2
fi
for name in GPUS GPUS_PER_NODE CPUS_PER_TASK PORT; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] && continue
    echo "error: $name must be a number, but is ${!name}" >&2
    exit 2
done
PARTITION=$1
JOB_NAME=$2
CONFIG=$3
shift 3

GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
export MASTER_PORT=${PORT:-29500}
read -r -a MORE <<< "${SRUN_ARGS:-}"

exec srun \
    --partition="$PARTITION" \
    --job-name="$JOB_NAME" \
    --gres=gpu:"$GPUS_PER_NODE" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${MORE[@]+"${MORE[@]}"} \
    "${PYTHON:-python}" -u "$(dirname "$0")/${MMVIL_TOOL:-train.py}" "$CONFIG" --launcher slurm "$@"
