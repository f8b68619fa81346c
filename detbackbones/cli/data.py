r"""Check a data set, convert it to the form that is trained on, or split it.

    detbackbones data check FOLDER
    detbackbones data convert FOLDER --output coco
    detbackbones data split FOLDER --output coco --val 0.2

The folder has images, and what is said of them in a format that is found: COCO, YOLO, Pascal VOC,
CVAT for images, LabelMe, Label Studio, a CSV file of boxes, or label maps: images of indices, of
colours, or a mask for each class.

`check` says what is there, everything that is wrong, by file and line, and what is suspicious, and
draws some images with their objects. The exit status is 1 if something is wrong. `convert` writes
train.json, val.json, ... in COCO's format for the splits that the data have; `split` makes them,
the same ones for a seed, with each class divided as the images are. Of label maps train.txt and
val.txt are written, lists of images, and labels/train and labels/val. Images stay where they are.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog, get_detection_dataset_dicts

from ..data.coco import register_coco
from ..data.formats import FORMATS, Findings, read_folder
from ..data.formats.convert import LABELS, split_pictures, write_as_found, write_splits
from ..data.formats.report import suspicions, tables
from ..data.semantic import register_semantic
from ..messages import fraction
from ..training.pictures import draw_annotations
from .program import fail, new_parser

PICTURE = "data.png"
SHOWN = 8  # images in the picture


def check(found: Findings, picture: str | None) -> None:
    """Say what there is, and draw it; exit status 1 if something is wrong."""
    print("\n\n".join(tables(found)), end="\n\n")
    for said in suspicions(found):
        print(f"suspicious: {said}")
    for fault in found.faults:
        print(f"wrong: {fault}")
    try:
        _draw(found, picture)
    except (ValueError, OSError) as error:
        print(f"no picture is drawn: {error}")
    if found.faults:
        print(f"{len(found.faults)} wrong", file=sys.stderr)
        sys.exit(1)
    print("nothing is wrong")


def _draw(found: Findings, picture: str | None) -> None:
    if picture is None and Path(PICTURE).exists():
        raise FileExistsError(f"{PICTURE} is there already: give --picture")
    shown = [p for p in found.pictures if p.things]
    if found.label_map is not None:  # they are named after the images, of all splits here
        shown = [*{p.file.stem: p for p in shown}.values()]
    shown = [shown[i * len(shown) // SHOWN] for i in range(SHOWN)] if len(shown) > SHOWN else shown
    if not shown:
        return
    with tempfile.TemporaryDirectory() as folder:
        (file,) = write_as_found(found, {"shown": shown}, Path(folder))
        if found.label_map is None:
            name = register_coco(str(file), str(found.folder))
        else:
            labels = str(Path(folder, LABELS, "shown"))
            name = register_semantic(str(file), labels, len(found.names), found.names, partial=True)
        dicts = get_detection_dataset_dicts(name, filter_empty=False)
        file = draw_annotations(dicts, MetadataCatalog.get(name), picture or PICTURE)
    print(f"wrote {file}")


def convert(found: Findings, output: str) -> None:
    """Write the splits that the data have."""
    splits = {split: [*pictures.values()] for split, pictures in found.splits.items()}
    _say(write_splits(found, splits, output), found)


def split(found: Findings, output: str, val: float, test: float, seed: int) -> None:
    """Write splits of all pictures."""
    fraction("--val", val)
    fraction("--test", test)
    if not 0 < val + test < 1:
        raise ValueError(f"--val {val} and --test {test} must add up to more than 0, less than 1")
    fractions = {"train": 1 - val - test, "val": val, "test": test}
    fractions = {name: part for name, part in fractions.items() if part}
    _say(write_splits(found, split_pictures([*found.pictures], fractions, seed), output), found)


def _say(files: Sequence[Path], found: Findings) -> None:
    for file in files:
        print(f"wrote {file}: its images are in '{found.folder}'")


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("data", __doc__)
    parser.add_argument("action", choices=("check", "convert", "split"))
    parser.add_argument("folder")
    add = parser.add_argument
    add("--format", choices=[*FORMATS], help="by default the one that is found")
    add("--palette", metavar="FILE", help="of label maps: names of values or colours")
    add("--output", metavar="FOLDER", help="of convert and split")
    add("--picture", metavar="FILE", help=f"of check (default: {PICTURE}, if there is none yet)")
    add("--val", type=float, default=0.2, help="of split, a fraction (default: %(default)s)")
    add("--test", type=float, default=0.0, help="of split, a fraction (default: %(default)s)")
    add("--seed", type=int, default=0, help="of split (default: %(default)s)")
    args = parser.parse_args(words)
    if args.action != "check" and not args.output:
        parser.error(f"{args.action} needs --output")
    try:
        name, found = read_folder(args.folder, args.format, args.palette)
        print(f"{args.folder}: {name}, {sum(len(p) for p in found.splits.values())} images")
        for note in found.notes:
            print(f"note: {note}")
        if args.action == "check":
            check(found, args.picture)
        elif args.action == "convert":
            convert(found, args.output)
        else:
            split(found, args.output, args.val, args.test, args.seed)
    except (ValueError, OSError) as error:
        fail("data", error)
