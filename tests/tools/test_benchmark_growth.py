"""The benchmark of large data sets, with a small one."""

import subprocess
import sys

import pytest
from support import TOOLS


@pytest.mark.slow
def test_three_starts():
    command = [sys.executable, str(TOOLS / "benchmark" / "growth.py")]
    command += ["--images", "20", "--boxes", "100"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("20 images, 100 boxes, 0 MiB of JSON")
    starts = [line.split("|")[1].strip() for line in run.stdout.splitlines()[4:]]
    assert starts == ["raw", *["first start"] * 5, *["second start"] * 5]
