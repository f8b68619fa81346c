#!/usr/bin/env bash
# Make .venv with everything that the tests need, in the versions of tools/constraints.txt.
# Calling it again is quick when nothing changed, and continues an install that was cut short.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/setup_env.stamp
install=(detbackbones/cli/install_detectron2.py detbackbones/package_index.py)
wanted=$({ pwd; cat setup.py tools/constraints.txt "${install[@]}"; } | cksum)
if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi
echo "setup_env: making $PWD/.venv with torch, detectron2 and what they need from the package" \
    "index: about 6 GB on disk" >&2

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    for python in python3.11 python3 ""; do
        if [[ -z $python ]]; then
            echo "setup_env: Python 3.11 or newer is needed (the pinned numpy does not run on" \
                "older ones), but neither python3.11 nor python3 is one" >&2
            exit 1
        fi
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    "$python" -m venv .venv
fi

rm -f "$stamp"
export PIP_CONSTRAINT=tools/constraints.txt
.venv/bin/python -m pip install --disable-pip-version-check -e '.[detr,docs,export,lora,predict,test,track]' >&2
.venv/bin/detbackbones install-detectron2
echo "$wanted" >"$stamp"
echo "setup_env: .venv is ready; activate it with . .venv/bin/activate" >&2
