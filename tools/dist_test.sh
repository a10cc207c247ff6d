#!/usr/bin/env bash
# Evaluate on several GPUs, or with several CPU processes where there is no GPU.
#
#   tools/dist_test.sh CONFIG CHECKPOINT N [arguments of test.py]
#
# N processes on this machine. On several machines, run it on each with the same NNODES, MASTER_ADDR
# and PORT, and its own NODE_RANK. PYTHON names the interpreter.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT N [arguments of test.py]" >&2
    exit 2
fi
CONFIG=$1
CHECKPOINT=$2
N=$3
shift 3

if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
    RENDEZVOUS=(--standalone)  # finds a free port
else
    RENDEZVOUS=(
        --nnodes="${NNODES:-1}"
        --node_rank="${NODE_RANK:-0}"
        --master_addr="${MASTER_ADDR:-127.0.0.1}"
        --master_port="${PORT:-29500}"
    )
fi

PYTHON=${PYTHON:-python}
SCRIPT=$(dirname "$0")/test.py
# What is missing is said once and in one line here, by every process and by torchrun later.
"$PYTHON" "$SCRIPT" "$CONFIG" "$CHECKPOINT" --check "$@" > /dev/null

exec "$PYTHON" -m torch.distributed.run "${RENDEZVOUS[@]}" --nproc_per_node="$N" \
    "$SCRIPT" "$CONFIG" "$CHECKPOINT" --launcher pytorch "$@"
