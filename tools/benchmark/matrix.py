"""Every kind of detector on every kind of backbone: does each of them learn?

    python tools/benchmark/matrix.py BOXES MASKS --output output/matrix

BOXES and MASKS are folders with train.json, val.json and images/; the mask transformer takes the
second, whose annotations have masks, at twice the size. Each cell is a `detbackbones train` with
the same number of small images, and one that ends after a step with a learning rate of next to
nothing. The table has AP50 of both, and the picture AP50 over the iterations. Runs that are in
runs.jsonl are not repeated. One backbone has ImageNet weights of the package index, the others
start at random.
"""

import argparse
import hashlib
import math
from pathlib import Path
from typing import Any

from detbackbones import build_pyramid, get_config
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig
from runs import Key, train_all
from tabulate import tabulate

# The config, what it needs besides, and whether it takes masks.
DETECTORS = {
    "Faster R-CNN": ("faster_rcnn", [], False),
    "RetinaNet": ("retinanet", [], False),
    "FCOS": ("fcos", [], False),
    "RT-DETRv2": ("rt_detr", [], False),
    "DEIMv2": ("rt_detr", ["model.architecture=deimv2"], False),
    "DINO": ("dino", [], False),
    "Mask2Former": ("mask2former_instance", [], True),
}
RANDOM = {"pretrained": False, "norm": "BN", "freeze_at": 0}
BACKBONES: dict[str, dict[str, Any]] = {
    "EfficientNet-Lite0 (ImageNet)": {"model_name": "tf_efficientnet_lite0"},
    "ResNet-18": {"model_name": "resnet18", **RANDOM},
    "ConvNeXt-Atto": {"model_name": "convnext_atto", **RANDOM},
    "Swin, narrow": {
        "model_name": "swin_tiny_patch4_window7_224",
        "model_kwargs": {"embed_dim": 48, "depths": [2, 2, 2, 2], "num_heads": [2, 4, 8, 16]},
        **RANDOM,
    },
    "ViT-Tiny": {"model_name": "vit_tiny_patch16_224", **RANDOM},
}


def config(detector: str, backbone: str) -> DictConfig:
    """The config of a cell. A ViT stands under a pyramid where the config has none."""
    name, _, masks = DETECTORS[detector]
    cfg = get_config(f"finetune/{name}.py")
    bottom_up = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    bottom_up.update(BACKBONES[backbone])
    if "bottom_up" not in cfg.model.backbone and "vit" in bottom_up.model_name:
        cfg.model.backbone = L(build_pyramid)(
            bottom_up=bottom_up, out_channels=128, min_level=2 if masks else 3
        )
    if bottom_up.get("pretrained") is False:
        cfg.optimizer.lr = 5e-4
        cfg.optimizer.params.backbone_lr_factor = 1.0
        cfg.dataloader.train.aspect_ratio_grouping = False
    return cfg


def cell(args: argparse.Namespace, detector: str, backbone: str, kind: str) -> tuple[list, str]:
    """The words of a training, and the metric."""
    _, needs, masks = DETECTORS[detector]
    cfg = config(detector, backbone)
    folder = args.output / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / "draft.yaml"
    LazyConfig.save(cfg, str(draft))
    # by the name a run that is kept is of this config, and not of an earlier one
    digest = hashlib.sha256(draft.read_bytes()).hexdigest()[:8]
    file = draft.replace(folder / f"{detector} {backbone} {digest}.yaml".replace(" ", "_"))
    data = args.masks if masks else args.boxes
    size = args.size * 2 if masks else args.size
    words = [f"--config-file={file}", *needs, "train.pictures=0"]
    words += [f"dataset.{split}_json={data}/{split}.json" for split in ("train", "val")]
    words += [f"dataset.{split}_images={data}/images" for split in ("train", "val")]
    words += [f"dataset.train_sizes=[{size - size // 8},{size}]", f"dataset.val_size={size}"]
    words += ["dataloader.train.num_workers=1", "dataloader.test.num_workers=1"]
    count = args.iterations if kind == "trained" else 1
    words += [f"train.max_iter={count}", f"train.eval_period={max(count // 2, 1)}"]
    words += [f"train.checkpointer.period={count}"]
    if kind == "untrained":
        words.append("optimizer.lr=1e-12")
    return words, "segm/AP50" if masks else "bbox/AP50"


def draw(curves: dict[Key, list[tuple[int, float]]], path: Path) -> None:
    """AP50 over the iterations: for each detector a line for each backbone."""
    figure = Figure((14, 6), dpi=100, layout="constrained")
    detectors, backbones, _ = map(dict.fromkeys, zip(*curves))
    rows = min(2, len(detectors))
    columns = -(-len(detectors) // rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for detector, axes in zip(detectors, grid):
        for backbone in backbones:
            ((_, before),) = curves[detector, backbone, "untrained"]
            curve = [(0, before), *curves[detector, backbone, "trained"]]
            axes.plot(*zip(*curve), marker="o", ms=3, label=backbone)
        axes.set_title(detector)
        axes.grid(alpha=0.3)
    for axes in grid:  # those that are left over
        axes.set_visible(False)
    figure.supxlabel("iteration")
    figure.supylabel("AP50, percent")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("boxes", type=Path, help="folder of data with boxes")
    parser.add_argument("masks", type=Path, help="folder of data with masks")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--iterations", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=192, help="of the images; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: %(default)s")
    for name, choices in (("detectors", DETECTORS), ("backbones", BACKBONES)):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            choices=choices,
            default=[*choices],
            metavar="NAME",
            help=f"by default all: {', '.join(choices)}",
        )
    args = parser.parse_args()
    for folder in (args.boxes, args.masks):
        if not folder.is_dir():
            parser.error(f"folder {str(folder)!r} must be a folder with the data")
    for key in ("iterations", "size", "jobs"):
        if getattr(args, key) < 1:
            parser.error(f"--{key} {getattr(args, key)} must be at least 1")
    cells = [
        (detector, backbone, kind)
        for detector in args.detectors
        for backbone in args.backbones
        for kind in ("untrained", "trained")
    ]
    results = train_all({key: cell(args, *key) for key in cells}, args.output, args.jobs)
    # detectron2's AP is NaN where nothing was found
    curves = {
        key: [(iteration, 0.0 if math.isnan(ap) else ap) for iteration, ap in result["curve"]]
        for key, result in results.items()
    }
    rows = []
    for detector in args.detectors:
        row = [detector]
        for backbone in args.backbones:
            before, after = (
                curves[detector, backbone, kind][-1][1] for kind in ("untrained", "trained")
            )
            row.append(f"{before:.1f} / {after:.1f}")
        rows.append(row)
    print(tabulate(rows, ["AP50 before / after", *args.backbones], "github", disable_numparse=True))
    draw(curves, args.output / "matrix.png")
    print(f"wrote {args.output / 'runs.jsonl'} and {args.output / 'matrix.png'}")


if __name__ == "__main__":
    main()
