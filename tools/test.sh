#!/usr/bin/env bash
# Run the tests in .venv, making it first if needed: tools/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_env.sh
exec .venv/bin/python -m pytest "$@"
