"""What several test modules share: a tiny data set, the training program, and the wheel."""

import shutil
import subprocess
import sys
from functools import partial

import pytest
from support import ROOT, load_tool, run_main


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Eight images to train on and four to validate on, of 64 pixels, with circles and squares."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    load_tool("draw_shapes").draw(folder, ("circle", "square"), train=8, val=4, size=64)
    return folder


@pytest.fixture
def tiny_cfg(tiny, tmp_path):
    """A small detector on the tiny data, for two iterations."""
    from detbackbones import get_config

    cfg = get_config("finetune/faster_rcnn.py")
    for split in ("train", "val"):
        cfg.dataset[f"{split}_json"] = f"{tiny}/{split}.json"
        cfg.dataset[f"{split}_images"] = f"{tiny}/images/{split}"
    cfg.dataset.update(train_sizes=[64], val_size=64)
    cfg.model.backbone.bottom_up.update(model_name="test_resnet", pretrained=False)
    cfg.dataloader.train.update(total_batch_size=2, num_workers=0)
    cfg.dataloader.test.num_workers = 0
    cfg.train.update(max_iter=2, pictures=1, log_period=1, output_dir=str(tmp_path / "run"))
    return cfg


@pytest.fixture
def run_train_net():
    """Call `detbackbones train` in this process; the exit code is returned."""
    from detbackbones.cli import train

    return partial(run_main, train)


@pytest.fixture
def one_thread():
    """As many as the programs have that a test starts: sums depend on it in their last bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("detbackbones", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(folder), str(folder)],
        check=True,
    )
    (path,) = folder.glob("detbackbones-*.whl")
    return path
