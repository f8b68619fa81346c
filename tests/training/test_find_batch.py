"""The largest batch that fits, against what a step on it takes."""

import re
import subprocess
import sys

import pytest
from detbackbones.training.find_batch import GIB, SHARE, find_batch
from detectron2.config import LazyConfig

# What was predicted, and the peak of another process that takes a step on as many images.
PROGRAM = """
import sys
from detbackbones.config import load_config
from detbackbones.training import find_batch as tool

cfg = load_config(sys.argv[1])
if sys.argv[2] == "find":
    print(tool.find_batch(cfg, memory=float(sys.argv[3])))
else:
    trainer = tool.build_trainer(tool.check_config(cfg), loads_all=False)
    images = [x for _, batch in zip(range(16), trainer.data_loader) for x in batch]
    image = max(images, key=lambda image: image["image"].numel())
    with tool.EventStorage():
        tool._fits(trainer, [image] * int(sys.argv[3]))
    print(tool._peak())
"""


def call(*words):
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.fixture
def cfg_file(tiny_cfg, tmp_path):
    tiny_cfg.dataset.update(train_sizes=[256], max_size=400)
    tiny_cfg.model.backbone.bottom_up.model_name = "resnet18"
    LazyConfig.save(tiny_cfg, str(tmp_path / "config.yaml"))
    return tmp_path / "config.yaml"


@pytest.mark.slow
def test_what_is_found_fits(cfg_file):
    memory = 2 * GIB
    found = call(cfg_file, "find", memory)
    assert 16 < found < 64
    assert 0.7 * SHARE * memory < call(cfg_file, "step", found) < memory


@pytest.mark.slow
def test_processes_agree(cfg_file, tmp_path):
    """Each takes steps alone, and none waits for another."""
    command = [sys.executable, "-m", "detbackbones", "train", "--config-file", str(cfg_file)]
    command += ["--find-batch", "--num-processes", "2", f"train.output_dir={tmp_path / 'out'}"]
    command += ["dataset.train_sizes=[64]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"hold dataloader.train.total_batch_size=(\d+)", done.stdout)
    assert len(found) == 1 and int(found[0]) % 2 == 0 and int(found[0]) >= 4


def test_float16_is_unscaled(tiny_cfg, monkeypatch):
    monkeypatch.setattr("detbackbones.training.find_batch.LARGEST", 2)
    tiny_cfg.train.amp.update(enabled=True, dtype="float16")
    assert find_batch(tiny_cfg) >= 2


def test_one_image_that_does_not_fit(tiny_cfg):
    with pytest.raises(ValueError, match="one image must fit into the 0.01 GiB that there are"):
        find_batch(tiny_cfg, memory=GIB / 100)
