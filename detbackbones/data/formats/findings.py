"""What a folder of data holds, whatever its format: pictures, their objects, and what is wrong."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..coco_file import area, clip, is_polygon
from ..images import SUFFIXES, image_size
from .json import MADE, kind_of

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
ALL = "all"  # the split of what is in none
_CLOSE = 1e-3  # by which a fraction may be rounded beyond 0 or 1

Where = int | str | None  # a line, or what an entry is called


@dataclass
class Thing:
    """An object in a picture.

    Attributes:
        label: name of its class.
        box: x, y, width and height in pixels.
        mask: COCO's polygons or RLE; None if it has a box alone.
        crowd: whether it is a crowd.
        area: in pixels, where the format says it.
    """

    label: str
    box: tuple[float, float, float, float]
    mask: list[list[float]] | dict[str, Any] | None = None
    crowd: bool = False
    area: float | None = None


@dataclass
class Picture:
    """An image with its objects."""

    file: Path
    width: int
    height: int
    things: list[Thing] = field(default_factory=list)


class Findings:
    """What the reader of a format finds in a folder; a fault is noted, and the rest goes on.

    Attributes:
        folder: that is read, an absolute path.
        files: all that are in it, also behind links, sorted.
        images: those of them that are images, by their names without a path.
        classes: names of the classes in the order of the format, if it has one.
        splits: the pictures of each of them, by file.
        faults: what is wrong, each with its file and line.
        notes: what one may want to know.
        unlabeled: images that lack the file which would say that nothing is in them.
        label_map: gives the label map of an image, uint8 (H, W), where the data are label maps.
    """

    def __init__(self, folder: Path):
        self.folder = Path(os.path.abspath(folder))
        self.files = walk(self.folder)
        self.images: dict[str, list[Path]] = {}
        for file in without_copies(self.files):
            self.images.setdefault(file.name, []).append(file)
        self.classes: list[str] = []
        self.splits: dict[str, dict[Path, Picture]] = {}
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.unlabeled: list[Path] = []
        self.label_map: Callable[[Path], np.ndarray] | None = None
        self._told: dict[Path, tuple[Path | None, Where]] = {}  # where an image was spoken of
        self._unusable: set[Path] = set()

    @cached_property
    def json_kinds(self) -> dict[Path, str | None]:
        """What the JSON files seem to be, see :func:`.json.kind_of`."""
        return {file: kind_of(file) for file in self.files if file.suffix == ".json"}

    def fault(self, file: Path, where: Where, text: str) -> None:
        """Note what is wrong.

        Args:
            file: in which it is.
            where: the line, or what it is called there.
            text: what is wrong.
        """
        place = f"line {where}: " if isinstance(where, int) else f"{where}: " if where else ""
        self.faults.append(f"'{file}': {place}{text}")

    def locate(self, name: str, file: Path, where: Where = None) -> Path | None:
        """The image that a file speaks of; a fault if there is none, or several.

        It is what the name says from the file's own folder, or else the one image of the data whose
        path ends with as much of the name as any does. Of a relative path more than the file's own
        name must be the same, if it has more.

        Args:
            name: the path that is given.
            file: that gives it.
            where: in it.
        """
        name = name.strip().replace("\\", "/")
        parts = [part for part in Path(name).parts if part not in (".", "..")]
        if not parts or len(name) > 2000:
            self.fault(file, where, f"image {name[:80]!r} must be the path of an image")
            return None
        near = Path(os.path.normpath(file.parent / name))
        if near.is_file():
            return near
        far = name.startswith("/") or re.match("[A-Za-z]:", name)  # of another machine
        same = self.images.get(parts[-1], [])
        for count in range(len(parts), 0 if far else min(len(parts), 2) - 1, -1):
            found = [path for path in same if path.parts[-count:] == tuple(parts[-count:])]
            if len(found) > 1:
                found = [p for p in found if self.split_of(p) == self.split_of(file)] or found
            if len(found) == 1:
                return found[0]
            if found:
                both = f"'{found[0]}' and '{found[1]}'"
                self.fault(file, where, f"image {name!r} must be one alone, and may be {both}")
                return None
        self.fault(file, where, f"image {name!r} must be in '{self.folder}', and is not")
        return None

    def split_of(self, file: Path) -> str:
        """The split that the folders of a path say, or else its name, by a word such as train."""
        if not file.is_relative_to(self.folder):
            return ALL
        inside = file.relative_to(self.folder)
        for text in (str(inside.parent), inside.stem):
            words = re.split(r"[^a-z]+", text.lower())
            if split := next((SPLITS[word] for word in reversed(words) if word in SPLITS), None):
                return split
        return ALL

    def picture(
        self,
        split: str,
        image: Path,
        file: Path | None = None,
        where: Where = None,
        size: Sequence[float] | None = None,
        *,
        rows: bool = False,
    ) -> Picture | None:
        """The picture of an image; a fault if it cannot be used, or was spoken of before.

        Args:
            split: that it belongs to.
            image: its file.
            file: that speaks of it; None is for the image alone.
            where: in that file.
            size: the width and height that are given there.
            rows: several entries of one file may speak of it, an object each.
        """
        if image in self._unusable:
            return None
        pictures = self.splits.setdefault(split, {})
        told = self._told.setdefault(image, (file, where))
        if file is not None and told != (file, where) and not (rows and told[0] == file):
            other = f"'{told[0]}', {told[1]}," if told[1] else f"'{told[0]}'"
            self.fault(file, where, f"'{image}' must be spoken of once, and {other} does too")
            return None
        if image not in pictures:
            try:
                width, height = image_size(str(image))
            except OSError as error:
                self.faults.append(str(error))
                self._unusable.add(image)
                return None
            pictures[image] = Picture(image, width, height)
        picture = pictures[image]
        if size and tuple(size) != (picture.width, picture.height):
            given = "x".join(f"{side:g}" for side in size)
            wanted = f"{picture.width}x{picture.height}"
            self.fault(file or image, where, f"size={given} must be {wanted}, that of '{image}'")
            return None
        return picture

    def add(
        self,
        picture: Picture,
        label: object,
        box: Sequence[float] | None,
        file: Path,
        where: Where,
        mask: list[list[float]] | dict[str, Any] | None = None,
        *,
        crowd: bool = False,
        size: float | None = None,
    ) -> None:
        """Add an object to a picture; a fault if its class, box or mask is none.

        Args:
            picture: which it is in.
            label: name of its class.
            box: x, y, width and height in pixels; None is for that around its polygons.
            file: that speaks of it.
            where: in that file.
            mask: polygons or RLE.
            crowd: whether it is a crowd.
            size: its area in pixels; None is for what is computed.
        """
        width, height = picture.width, picture.height
        inside = f"its image of {width}x{height} pixels"
        if not isinstance(label, str) or not label.strip():
            self.fault(file, where, f"class {label!r} must be text")
            return
        if isinstance(mask, list) and not (
            mask and all(is_polygon(polygon, width, height) for polygon in mask)
        ):
            self.fault(file, where, f"polygon must have three points or more in {inside}")
            return
        if box is None:
            xs, ys = ([x for polygon in mask for x in polygon[i::2]] for i in (0, 1))
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        box = tuple(map(float, box))
        if not (min(box[2:]) > 0 and min(clip(list(box), width, height)[2:]) > 0):
            shown = ", ".join(f"{value:g}" for value in box)
            text = f"box=[{shown}] (x, y, width, height) must have an area in {inside}"
            self.fault(file, where, text)
            return
        picture.things.append(Thing(label.strip(), box, mask, crowd, size))

    @property
    def names(self) -> list[str]:
        """Names of the classes: in the order of the format, then sorted."""
        used = {thing.label for picture in self.pictures for thing in picture.things}
        return [*self.classes, *sorted(used - {*self.classes})]

    @property
    def pictures(self) -> Iterator[Picture]:
        """Those of all splits, each file once."""
        merged = {file: p for pictures in self.splits.values() for file, p in pictures.items()}
        yield from merged.values()

    def coco(self, pictures: Iterable[Picture]) -> dict[str, Any]:
        """Pictures as a COCO file has them; names of files are relative to the folder.

        Args:
            pictures: of a split.
        """
        ids = {name: number for number, name in enumerate(self.names, 1)}
        images, annotations = [], []
        for key, picture in enumerate(pictures, 1):
            image = {"id": key, "file_name": os.path.relpath(picture.file, self.folder)}
            image |= {"width": picture.width, "height": picture.height}
            images.append(image)
            for thing in picture.things:
                entry = {"id": len(annotations) + 1, "image_id": key, "bbox": [*thing.box]}
                entry |= {"category_id": ids[thing.label], "iscrowd": int(thing.crowd)}
                if thing.mask:
                    entry["segmentation"] = thing.mask
                size = area(entry, image) if thing.area is None else thing.area
                annotations.append(entry | {"area": size})
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        return {"info": {"description": MADE}, **content}


def walk(folder: Path) -> list[Path]:
    """All files below a folder, also behind links, sorted."""
    seen, found = set(), []
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in files]
    return sorted(found)


def without_copies(files: Iterable[Path]) -> list[Path]:
    """The images among files; an ``.npy`` that another program keeps beside an image is none."""
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    stems = {file.with_suffix("") for file in images if file.suffix != ".npy"}
    return [x for x in images if x.suffix != ".npy" or x.with_suffix("") not in stems]


def numbers(words: Iterable[object]) -> list[float] | None:
    """Words as numbers; None if one is none, or is not finite."""
    try:
        values = [float(word) for word in words]  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return values if all(abs(value) < 1e9 for value in values) else None


def pairs(points: object) -> list[float] | None:
    """Points [[x, y], ...] as one list of numbers; None if they are none."""
    if not isinstance(points, list):
        return None
    if not all(isinstance(point, list | tuple) and len(point) == 2 for point in points):
        return None
    return numbers(value for point in points for value in point)


def are_fractions(values: Iterable[float]) -> bool:
    """Whether values are from 0 to 1, but for rounding."""
    return all(-_CLOSE <= value <= 1 + _CLOSE for value in values)
