"""The benchmark of the detectors runs, and refuses to compare what is not equal."""

import re
import subprocess
import sys

import pytest
from support import TOOLS

pytestmark = pytest.mark.slow


def run(*words):
    command = [sys.executable, str(TOOLS / "benchmark" / "detr.py"), "--model", "test_resnet"]
    command += ["--size", "64", "96", "--queries", "20", "--rounds", "1", "--threads", "1"]
    return subprocess.run([*command, *words], capture_output=True, text=True)


@pytest.mark.parametrize("architecture", ["deformable_detr", "mask2former"])
def test_it_prints_a_table(architecture):
    done = run("--architecture", architecture)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if f"{architecture} on test_resnet" in line]
    assert len(lines) == 2
    assert re.search(r"\| transformers \| +[0-9.]+ \|.*\| +[0-9]+\.[0-9]{3} \|", lines[1])


def test_what_cannot_be_compared_is_refused():
    done = run("--model", "regnetx_002", "--architecture", "deformable_detr")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("detr: ")]
    assert "'regnetx_002' cannot be saved" in line
