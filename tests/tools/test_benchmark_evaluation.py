"""The benchmark of evaluators, on a few images."""

import subprocess
import sys

from support import TOOLS


def test_the_evaluators_give_equal_numbers():
    command = [sys.executable, str(TOOLS / "benchmark" / "evaluation.py"), "--images", "30"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "detbackbones.CocoEvaluator" in run.stdout and "all numbers equal" in run.stdout
