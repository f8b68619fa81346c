"""What is in a data set, and what is suspicious about it."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path

from tabulate import tabulate

from ...messages import few
from .findings import Findings, Picture, Thing

_MOST = 10  # copies that are named
_SIDES = (1, 8, 16, 32, 64, 128, 256, 512)  # pixels: the square root of a box's area


def tables(found: Findings) -> list[str]:
    """Tables of the splits, the classes and the sizes of objects."""
    splits = found.splits
    if found.label_map is not None:
        return _tables_of_label_maps(found)
    rows = []
    for split, pictures in splits.items():
        counts = [len(picture.things) for picture in pictures.values()]
        masks = sum(thing.mask is not None for p in pictures.values() for thing in p.things)
        row = [split, len(counts), _sizes(pictures.values()), counts.count(0), sum(counts)]
        rows.append([*row, masks, max(counts, default=0)])
    headers = ["split", "images", "sizes", "without objects", "objects", "with masks"]
    headers.append("most in one")
    per_class = {split: Counter(_labels(found, split)) for split in splits}
    classes = [[name, *(per_class[split][name] for split in splits)] for name in found.names]
    sides = [(t.box[2] * t.box[3]) ** 0.5 for picture in found.pictures for t in picture.things]
    sizes = []
    for low, high in zip((0, *_SIDES), (*_SIDES, float("inf"))):
        if count := sum(low <= side < high for side in sides):
            part = count / len(sides)
            sizes.append([f"{low} to {high:g}", count, f"{part:.0%}", "#" * round(40 * part)])
    return [
        tabulate(rows, headers, "github"),
        tabulate(classes, ["class", *splits], "github", disable_numparse=[0]),
        tabulate(sizes, ["side, pixels", "objects", "part", ""], "github"),
    ]


def _tables_of_label_maps(found: Findings) -> list[str]:
    """Tables of the splits, and of the images and the pixels of each class."""
    splits = {split: [*pictures.values()] for split, pictures in found.splits.items()}
    rows = [[split, len(pictures), _sizes(pictures)] for split, pictures in splits.items()]
    pixels = {s: sum(p.width * p.height for p in pictures) or 1 for s, pictures in splits.items()}
    classes = []
    for name in found.names:
        areas = {
            s: [t.area for p in ps for t in p.things if t.label == name] for s, ps in splits.items()
        }
        parts = [f"{len(areas[s])}, {sum(areas[s]) / pixels[s]:.1%}" for s in splits]
        classes.append([name, *parts])
    headers = ["class", *(f"{split}: images, pixels" for split in splits)]
    return [
        tabulate(rows, ["split", "images", "sizes"], "github"),
        tabulate(classes, headers, "github", disable_numparse=True),
    ]


def _sizes(pictures: Collection[Picture]) -> str:
    """Their sizes, the smallest and the largest if they are more than three."""
    sizes = sorted({(p.width * p.height, f"{p.width}x{p.height}") for p in pictures})
    names = [name for _, name in sizes]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]}"


def suspicions(found: Findings) -> list[str]:
    """What is right as it is written, and may yet be a mistake."""
    said, names, pictures = [], found.names, [*found.pictures]
    where = {split: {*_labels(found, split)} for split in found.splits}
    for name in names:
        having = [split for split in where if name in where[split]]
        if not having:
            said.append(f"class {name!r} has no {'object' if found.label_map is None else 'pixel'}")
        elif len(having) == 1 < len(where):
            said.append(f"class {name!r} is in {having[0]} alone")
    alike = defaultdict(list)
    for name in names:
        alike["".join(name.lower().split())].append(name)
    said += [f"classes {few(names)} may be one" for names in alike.values() if len(names) > 1]
    said += _copies(found)
    kinds = {
        "at most one pixel wide or high": _is_thin,
        "partly outside of their images": _sticks_out,
    }
    for what, wrong in kinds.items():
        boxes = [(p, t) for p in pictures for t in p.things if wrong(p, t)]
        if boxes:
            picture, thing = boxes[0]
            example = f"such as a {thing.label!r} in '{picture.file}'"
            said.append(f"{len(boxes)} boxes are {what}, {example}")
    twice = sum(len(p.things) - len({(t.label, t.box) for t in p.things}) for p in pictures)
    if twice:
        said.append(f"{twice} objects are there twice")
    if found.unlabeled:
        count, first = len(found.unlabeled), found.unlabeled[0]
        said.append(f"{count} images have no file of labels, such as '{first}': taken as empty")
    every = {file for files in found.images.values() for file in files}
    silent = every - {picture.file for picture in pictures}
    if silent:
        said.append(f"of {len(silent)} images nothing is said, such as '{min(silent)}'")
    return said


def _is_thin(picture: Picture, thing: Thing) -> bool:
    return min(thing.box[2:]) <= 1


def _sticks_out(picture: Picture, thing: Thing) -> bool:
    x, y, width, height = thing.box
    return min(x, y) < -1 or x + width > picture.width + 1 or y + height > picture.height + 1


def _labels(found: Findings, split: str) -> list[str]:
    return [thing.label for picture in found.splits[split].values() for thing in picture.things]


def _copies(found: Findings) -> list[str]:
    """Images that are in several splits, or there under several names, by their content."""
    by_size: dict[int, list[tuple[str, Path]]] = defaultdict(list)
    for split, pictures in found.splits.items():
        for file in pictures:
            by_size[file.stat().st_size].append((split, file))
    places: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for size, alike in by_size.items():
        for split, file in alike if len(alike) > 1 else ():
            digest = hashlib.sha1(file.read_bytes()).hexdigest()
            places[f"{size} {digest}"].append((split, file))
    said = []
    for copies in places.values():
        if len(copies) > 1:
            splits = sorted({split for split, _ in copies})
            files = few([str(file) for file in dict.fromkeys(file for _, file in copies)])
            what = f"is in {' and '.join(splits)}" if len(splits) > 1 else "is there twice"
            said.append(f"one image {what}: {files}")
    more = [f"and {len(said) - _MOST} more images are there twice"] if len(said) > _MOST else []
    return said[:_MOST] + more
