"""The programs that train many times: what is kept, and the configs that they make."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from detectron2.config import LazyConfig, instantiate
from PIL import Image
from support import TOOLS, load_tool

sys.path.insert(0, str(TOOLS / "benchmark"))
runs, matrix = load_tool("benchmark/runs"), load_tool("benchmark/matrix")
BOTTOM_UP = "model.backbone.bottom_up"


@pytest.mark.slow
def test_a_run_is_kept_and_not_repeated(tiny, tmp_path):
    words = ["--config-file=finetune/retinanet.py", "train.max_iter=1", "train.pictures=0"]
    words += [f"dataset.{split}_json={tiny}/{split}.json" for split in ("train", "val")]
    words += [f"dataset.{split}_images={tiny}/images/{split}" for split in ("train", "val")]
    words += [f"{BOTTOM_UP}.model_name=test_resnet", f"{BOTTOM_UP}.pretrained=False"]
    words += ["dataset.train_sizes=[64]", "dataset.val_size=64"]
    words += ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    case = {("retinanet", 0): (words, "bbox/AP50")}
    first = runs.train_all(case, tmp_path, 1)
    written = (tmp_path / "retinanet_0" / "log.txt").stat().st_mtime_ns
    assert runs.train_all(case, tmp_path, 1).keys() == first.keys()
    assert (tmp_path / "retinanet_0" / "log.txt").stat().st_mtime_ns == written
    (line,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert line["key"] == ["retinanet", 0] and line["seconds"] > 0
    assert line["command"].startswith("detbackbones train --config-file=finetune/retinanet.py")
    with pytest.raises(SystemExit, match="failed: detbackbones train: .*'train.max_itr'"):
        runs.train_all({("b",): ([*words, "train.max_itr=2"], "bbox/AP50")}, tmp_path, 1)


@pytest.mark.parametrize("detector", ["Faster R-CNN", "FCOS", "DINO", "Mask2Former"])
@pytest.mark.parametrize("backbone", ["Swin, narrow", "ViT-Tiny"])
def test_every_detector_stands_on_every_backbone(detector, backbone):
    cfg = matrix.config(detector, backbone)
    bottom_up = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    assert bottom_up.pretrained is False and bottom_up.freeze_at == 0
    bottom_up.in_channels = 3
    strides = [shape.stride for shape in instantiate(cfg.model.backbone).output_shape().values()]
    assert strides[:3] in ([4, 8, 16], [8, 16, 32])


def test_the_words_of_a_cell_name_its_config(tmp_path):
    folders = {"boxes": Path("blood"), "masks": Path("nuclei"), "output": tmp_path}
    args = Namespace(**folders, size=64, iterations=4)
    words, metric = matrix.cell(args, "Mask2Former", "ViT-Tiny", "trained")
    assert (words, metric) == matrix.cell(args, "Mask2Former", "ViT-Tiny", "trained")
    cfg = LazyConfig.load(words[0].removeprefix("--config-file="))
    assert cfg.model.backbone.bottom_up.model_name == "vit_tiny_patch16_224"
    assert metric == "segm/AP50" and "dataset.val_size=128" in words
    other, metric = matrix.cell(args, "DEIMv2", "ViT-Tiny", "untrained")
    assert other[0] != words[0] and metric == "bbox/AP50" and "dataset.val_size=64" in other


def test_the_picture_shows_the_results(tmp_path):
    cells = [(detector, backbone) for detector in matrix.DETECTORS for backbone in matrix.BACKBONES]
    pictures = []
    for last in (40.0, 80.0, 80.0):
        curves = {(*cell, "untrained"): [(1, 0.0)] for cell in cells}
        curves |= {(*cell, "trained"): [(2, 20.0), (4, last)] for cell in cells}
        matrix.draw(curves, tmp_path / "matrix.png")
        pictures.append(Image.open(tmp_path / "matrix.png").tobytes())
    assert pictures[0] != pictures[1] == pictures[2]
