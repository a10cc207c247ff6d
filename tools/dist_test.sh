#!/usr/bin/env bash
# Evaluate on several GPUs, or with several CPU processes if there is no GPU.
#
#   tools/dist_test.sh CONFIG CHECKPOINT N [arguments of test.py]
#
# See dist_train.sh for several machines.
set -euo pipefail

if ! [[ $# -ge 3 && $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG CHECKPOINT N [arguments of test.py], with N processes" >&2
    exit 2
fi
MMVIL_TOOL=test.py
source "$(dirname "$0")/dist_train.sh" "$1" "$3" "$2" "${@:4}"
