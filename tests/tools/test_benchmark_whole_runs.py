"""The benchmark of whole trainings, with one iteration on a few images."""

import json
import subprocess
import sys

import pytest
from detbackbones.config import load_config
from support import TOOLS


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["faster_rcnn", "rt_detr", "rt_detr_bfloat16"])
def test_both_of_a_pair_train(tiny, tmp_path, pair):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for split in ("train", "val"):
        data = json.loads((tiny / f"{split}.json").read_text())
        for image in data["images"]:
            name = f"{split}_{image['file_name']}"
            (folder / "images" / name).symlink_to(tiny / "images" / split / image["file_name"])
            image["file_name"] = name
        (folder / f"{split}.json").write_text(json.dumps(data))
    command = [sys.executable, str(TOOLS / "benchmark" / "whole_runs.py"), str(folder)]
    command += ["--output", str(tmp_path / "out"), "--pairs", pair, "--threads", "1"]
    command += ["--iterations", "2", "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (kept,) = json.loads((tmp_path / "out" / "whole_runs.json").read_text())
    assert len(kept["results"]) == 2
    amp = load_config(str(tmp_path / "out" / f"{pair}_0" / "config.yaml")).train.amp
    assert (amp.enabled, amp.dtype) == (pair.endswith("bfloat16"), "bfloat16")
    for (run,) in kept["results"].values():
        assert run["whole"] > run["training"] >= 0 and 0 <= run["AP"] <= 100
