#!/usr/bin/env bash
# Train on several GPUs, or with several CPU processes if there is no GPU.
#
#   tools/dist_train.sh CONFIG N [arguments of train.py]
#
# N processes on this machine. On several machines, run it on each with the same NNODES, MASTER_ADDR
# and PORT, and its own NODE_RANK. PYTHON names the interpreter.
set -euo pipefail

if ! [[ $# -ge 2 && $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG N [arguments of train.py], with N processes" >&2
    exit 2
fi
for name in NNODES NODE_RANK PORT; do
    [[ ${!name:-1} =~ ^[0-9]+$ ]] && continue
    echo "error: $name must be a number, but is ${!name}" >&2
    exit 2
done
CONFIG=$1
N=$2
shift 2

if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
    RENDEZVOUS=(--standalone)  # finds a free port
elif ((10#${NODE_RANK:-0} >= 10#${NNODES:-1})); then  # torchrun would wait for minutes
    echo "error: NODE_RANK must be less than NNODES=${NNODES:-1}, but is ${NODE_RANK:-0}" >&2
    exit 2
else
    RENDEZVOUS=(
        --nnodes="${NNODES:-1}"
        --node_rank="${NODE_RANK:-0}"
        --master_addr="${MASTER_ADDR:-127.0.0.1}"
        --master_port="${PORT:-29500}"
    )
fi

PYTHON=${PYTHON:-python}
SCRIPT=$(dirname "$0")/${MMVIL_TOOL:-train.py}
# Report errors in one line here, before every process and torchrun add theirs.
"$PYTHON" "$SCRIPT" "$CONFIG" --check "$@" > /dev/null

exec "$PYTHON" -m torch.distributed.run "${RENDEZVOUS[@]}" --nproc_per_node="$N" \
    "$SCRIPT" "$CONFIG" --launcher pytorch "$@"
