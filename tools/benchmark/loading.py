"""Images a second that one core reads, resizes and maps, by this package and by detectron2.

    python tools/benchmark/loading.py

Both mappers have detectron2's augmentations of its COCO configs, and the same random numbers: the
boxes must be equal. The images are made for it: JPEGs with 20 objects each.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import detectron2.data.transforms as T
import numpy as np
import torch
from detbackbones.data import CheckedDatasetMapper
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util
from tabulate import tabulate

SIZES = {"640 x 480": (640, 480), "2448 x 2048": (2448, 2048)}
KINDS = {"boxes": None, "polygons": "polygon", "bits": "bitmask"}
OBJECTS = 20


def draw(folder: Path, width: int, height: int, kind: str) -> dict:
    """A dataset dict of a picture with something in it, in detectron2's format."""
    numbers = np.random.default_rng(0)
    coarse = numbers.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels = (smooth + numbers.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    path = folder / f"{width}.jpg"
    Image.fromarray(pixels).save(path, quality=90)
    annotations = []
    for _ in range(OBJECTS):
        center = numbers.uniform(0.2, 0.8, 2) * (width, height)
        turns = np.linspace(0, 2 * np.pi, 30, endpoint=False)
        outline = center + np.stack([np.cos(turns), np.sin(turns)], 1) * width / 12
        low, high = outline.min(0), outline.max(0)
        entry = {"bbox": [*low, *high], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        if kind != "boxes":
            entry["segmentation"] = [outline.flatten().tolist()]
        if kind == "bits":
            (entry["segmentation"],) = mask_util.frPyObjects(entry["segmentation"], height, width)
        annotations.append(entry)
    size = {"file_name": str(path), "width": width, "height": height}
    return {**size, "image_id": 1, "annotations": annotations}


def build(mapper: type, kind: str) -> DatasetMapper:
    """A mapper with the augmentations of detectron2's COCO configs."""
    augmentations = [T.ResizeShortestEdge([640, 672, 800], 1333, "choice"), T.RandomFlip()]
    masks = {"use_instance_mask": True, "instance_mask_format": KINDS[kind]} if KINDS[kind] else {}
    return mapper(True, augmentations=augmentations, image_format="RGB", **masks)


def once(mapper: DatasetMapper, image: dict, seed: int) -> tuple[float, dict]:
    """Milliseconds, and the sample."""
    random.seed(seed)
    np.random.seed(seed)
    start = time.perf_counter()
    sample = mapper(image)
    return 1000 * (time.perf_counter() - start), sample


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            for kind in KINDS:
                image = draw(Path(folder), *size, kind)
                mappers = [build(mapper, kind) for mapper in (DatasetMapper, CheckedDatasetMapper)]
                times: list[list[float]] = [[], []]
                for seed in range(args.rounds):
                    pair = [once(mapper, image, seed) for mapper in mappers]
                    boxes = [sample["instances"].gt_boxes.tensor for _, sample in pair]
                    if not torch.equal(*boxes):
                        raise SystemExit("the boxes differ")
                    for past, (milliseconds, _) in zip(times, pair):
                        past.append(milliseconds)
                theirs, ours = map(statistics.median, times)
                rows.append([name, kind, theirs, ours, theirs / ours])
    headers = ["image", "objects", "detectron2, ms", "detbackbones, ms", "times as fast"]
    print(tabulate(rows, headers, "github", floatfmt=".1f"))


if __name__ == "__main__":
    main()
