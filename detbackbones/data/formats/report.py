"""What is in a data set, and what is suspicious about it."""

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

from tabulate import tabulate

from ...messages import few
from .findings import Findings

_SIDES = (1, 8, 16, 32, 64, 128, 256, 512)  # pixels: the square root of a box's area


def tables(found: Findings) -> list[str]:
    """Tables of the splits, the classes and the sizes of objects."""
    splits = found.splits
    rows = []
    for split, pictures in splits.items():
        counts = [len(picture.things) for picture in pictures.values()]
        masks = sum(thing.mask is not None for p in pictures.values() for thing in p.things)
        rows.append(
            [split, len(counts), counts.count(0), sum(counts), masks, max(counts, default=0)]
        )
    headers = ["split", "images", "without objects", "objects", "with masks", "most in one"]
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


def suspicions(found: Findings) -> list[str]:
    """What is right as it is written, and may yet be a mistake."""
    said = []
    splits = list(found.splits)
    if len(splits) > 1:
        where = {split: {*_labels(found, split)} for split in splits}
        for name in found.names:
            having = [split for split in splits if name in where[split]]
            if len(having) == 1:
                said.append(f"class {name!r} is in {having[0]} alone")
    for name in found.names:
        if not any(name == t.label for p in found.pictures for t in p.things):
            said.append(f"class {name!r} has no object")
    alike = defaultdict(list)
    for name in found.names:
        alike["".join(name.lower().split())].append(name)
    said += [f"classes {few(names)} may be one" for names in alike.values() if len(names) > 1]
    said += _copies(found)
    thin = [(p, t) for p in found.pictures for t in p.things if min(t.box[2:]) <= 1]
    if thin:
        picture, thing = thin[0]
        said.append(
            f"{len(thin)} boxes are at most one pixel wide or high, such as a {thing.label!r} in "
            f"'{picture.file}'"
        )
    return said


def _labels(found: Findings, split: str) -> list[str]:
    return [thing.label for picture in found.splits[split].values() for thing in picture.things]


def _copies(found: Findings) -> list[str]:
    """Images that are in several splits, or there under several names, by their content."""
    places: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for split, pictures in found.splits.items():
        for file in pictures:
            places[hashlib.sha1(file.read_bytes()).hexdigest()].append((split, file))
    said = []
    for copies in places.values():
        if len(copies) > 1:
            splits = {split for split, _ in copies}
            files = few([str(file) for file in dict.fromkeys(file for _, file in copies)])
            what = f"is in {' and '.join(sorted(splits))}" if len(splits) > 1 else "is there twice"
            said.append(f"one image {what}: {files}")
    return said
