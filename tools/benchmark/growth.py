"""Seconds and memory that a training needs to start on a large data set.

    python tools/benchmark/growth.py
    python tools/benchmark/growth.py --images 1000000 --boxes 8000000

A COCO file of the size of COCO's training set is made, its images links to one. The raw JSON is
read; then a training's data are registered and the first batch is loaded, with two workers, first
with nothing remembered of the file and then again: each in a process of its own. Memory is the
resident set in MiB above that of the imports; a worker's is what it does not share.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tabulate import tabulate

MIB = 2**20


def make(folder: Path, images: int, boxes: int) -> None:
    """Write the data set: images of 640 x 480, 80 classes."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    names = [f"{i:012d}.jpg" for i in range(images)]
    for i, name in enumerate(names):
        if i % 50_000 == 0:  # a file may have so many links
            first = folder / "images" / name
            Image.new("RGB", (640, 480)).save(first)
        else:
            os.link(first, folder / "images" / name)
    sizes = {"width": 640, "height": 480}
    records = [{"id": i, "file_name": name, **sizes} for i, name in enumerate(names)]
    corners, sides = random.uniform(0, 400, (boxes, 2)), random.uniform(5, 80, (boxes, 2))
    bbox = np.concatenate([corners, sides], 1).round(2).tolist()
    owners = random.integers(images, size=boxes).tolist()
    classes = random.integers(1, 81, boxes).tolist()
    annotations = [
        {"id": i + 1, "image_id": owners[i], "category_id": classes[i], "bbox": bbox[i]}
        | {"iscrowd": 0, "area": round(bbox[i][2] * bbox[i][3], 2)}
        for i in range(boxes)
    ]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    content = {"images": records, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(content))


def memory(process: int | str = "self", key: str = "Rss") -> float:
    """MiB of a process now."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(rf"^{key}\w*:\s+(\d+)", text, re.M)) / 1024


@contextmanager
def measured(what: str, rows: list[list], base: float) -> Iterator[None]:
    start = time.perf_counter()
    yield
    gc.collect()
    rows.append([what, time.perf_counter() - start, memory() - base])


def read(folder: Path) -> list[list]:
    """The raw JSON."""
    rows: list[list] = []
    with measured("json.load", rows, memory()):
        kept = json.loads((folder / "data.json").read_text())
    assert kept
    return rows


def start(folder: Path) -> list[list]:
    """What `detbackbones train` does before the first iteration."""
    from detbackbones.data.coco import register_coco
    from detbackbones.data.loader import build_train_loader
    from detbackbones.data.mapper import CheckedDatasetMapper
    from detectron2.data import get_detection_dataset_dicts
    from detectron2.data.transforms import ResizeShortestEdge

    rows: list[list] = []
    base = memory()
    with measured("check and register", rows, base):
        name = register_coco(str(folder / "data.json"), str(folder / "images"))
    with measured("dataset dicts", rows, base):
        dicts = get_detection_dataset_dicts(name)
    mapper = CheckedDatasetMapper(
        is_train=True, augmentations=[ResizeShortestEdge(64)], image_format="RGB"
    )
    with measured("loader and first batch", rows, base):
        loader = build_train_loader(dicts, mapper=mapper, total_batch_size=4, num_workers=2)
        del dicts
        batches = iter(loader)
        next(batches)
    workers = batches._workers
    rows.append(["a worker's own", None, max(memory(w.pid, "Private") for w in workers)])
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    rows.append(["all, at the peak", sum(row[1] for row in rows[:-1]), peak - base])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=118_000, help="default: %(default)s")
    parser.add_argument("--boxes", type=int, default=860_000, help="default: %(default)s")
    parser.add_argument("--part", choices=("read", "start"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps({"read": read, "start": start}[args.part](args.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.images, args.boxes)
        size = os.path.getsize(f"{folder}/data.json") / MIB
        print(f"{args.images} images, {args.boxes} boxes, {size:.0f} MiB of JSON\n")
        table = []
        for label, part in (("raw", "read"), ("first start", "start"), ("second start", "start")):
            command = [sys.executable, __file__, "--part", part, "--folder", folder]
            done = subprocess.run(
                command,
                env={**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"},
                stdout=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                sys.exit(f"growth: {label} failed with exit status {done.returncode}")
            rows = json.loads(done.stdout.splitlines()[-1])
            table += [[label, *row] for row in rows]
    print(tabulate(table, ["", "step", "seconds", "MiB"], "github", floatfmt=".1f"))


if __name__ == "__main__":
    main()
