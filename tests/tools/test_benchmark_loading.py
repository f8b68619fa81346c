"""The benchmark of mappers, with a few rounds."""

import subprocess
import sys

import pytest
from support import TOOLS


@pytest.mark.slow
def test_the_mappers_give_equal_boxes():
    command = [sys.executable, str(TOOLS / "benchmark" / "loading.py"), "--rounds", "2"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:3] for line in run.stdout.splitlines()[2:]]
    assert [tuple(map(str.strip, row)) for row in rows] == [
        (size, kind)
        for size in ("640 x 480", "2448 x 2048")
        for kind in ("boxes", "polygons", "bits")
    ]
