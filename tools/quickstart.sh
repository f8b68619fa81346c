#!/usr/bin/env bash
# Fine-tune a detector on photographs, from nothing: tools/quickstart.sh [options]
# The options are those of tools/quickstart.py; --help lists them.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup_env.sh
exec .venv/bin/python tools/quickstart.py "$@"
