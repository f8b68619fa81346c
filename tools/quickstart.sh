#!/usr/bin/env bash
# Train, export and fine-tune a small detector, from nothing: tools/quickstart.sh [options]
# The options are those of tools/quickstart.py; --help lists them.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_env.sh
exec .venv/bin/python tools/quickstart.py "$@"
