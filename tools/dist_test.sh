#!/usr/bin/env bash
# Evaluate on several GPUs, or with several CPU processes if there is no GPU.
#
#   tools/dist_test.sh CONFIG CHECKPOINT N [arguments of test.py]
#
# See dist_train.sh for several machines.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT N [arguments of test.py]" >&2
    exit 2
fi
MMVIL_TOOL=test.py
source "$(dirname "$0")/dist_train.sh" "$1" "$3" "$2" "${@:4}"
