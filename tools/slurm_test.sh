#!/usr/bin/env bash
# Evaluate on a SLURM cluster, one process per GPU.
#
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]
#
# See slurm_train.sh for the environment.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]" >&2
    exit 2
fi
MMVIL_TOOL=test.py
source "$(dirname "$0")/slurm_train.sh" "$@"
