#!/usr/bin/env bash
# Run the tests in .venv, making it first if needed: tools/test.sh [--all] [pytest arguments]
# Those that take long (marked slow) run with --all alone.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_env.sh
marks=(-m "not slow")
words=()
for word in "$@"; do
    if [[ $word == --all ]]; then marks=(); else words+=("$word"); fi
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # there is a process for each core
# xdist would begin with the files of most tests, and end with a long file of few in one process.
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "${marks[@]}" "${words[@]}"
