#!/usr/bin/env bash
# Installs fmzoo with what its tests need and runs them, on all cores.
#   bash launch/test.sh [pytest arguments]

source "$(dirname "$0")/environment.sh"

fmzoo_environment '[test]'
ruff check .
python -m pytest -n "${FMZOO_TEST_PROCESSES:-auto}" --dist loadfile --no-loadscope-reorder --durations=15 "$@"
