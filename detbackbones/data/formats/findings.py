"""What a folder of data holds, whatever its format: pictures, their objects, and what is wrong."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..coco_file import area, clip, is_polygon
from ..images import SUFFIXES, image_size

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
ALL = "all"  # the split of what is in none
_CLOSE = 1e-3  # by which a fraction may be rounded beyond 0 or 1


@dataclass
class Thing:
    """An object in a picture.

    Attributes:
        label: name of its class.
        box: x, y, width and height in pixels.
        mask: COCO's polygons or RLE; None if it has a box alone.
        crowd: whether it is a crowd.
    """

    label: str
    box: tuple[float, float, float, float]
    mask: list[list[float]] | dict[str, Any] | None = None
    crowd: bool = False


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
        folder: that is read.
        classes: names of the classes in the order of the format, if it has one.
        splits: the pictures of each of them, by file.
        faults: what is wrong, each with its file and line.
        notes: what one may want to know.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.classes: list[str] = []
        self.splits: dict[str, dict[Path, Picture]] = {}
        self.faults: list[str] = []
        self.notes: list[str] = []

    def fault(self, file: Path, where: int | str | None, text: str) -> None:
        """Note what is wrong.

        Args:
            file: in which it is.
            where: the line, or what it is called there.
            text: what is wrong.
        """
        place = f"line {where}: " if isinstance(where, int) else f"{where}: " if where else ""
        self.faults.append(f"'{file}': {place}{text}")

    @cached_property
    def images(self) -> dict[str, list[Path]]:
        """The images of the folder by their names without a path."""
        found: dict[str, list[Path]] = {}
        for file in sorted(self.folder.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                found.setdefault(file.name, []).append(file)
        return found

    def locate(self, name: str, file: Path, where: int | str | None = None) -> Path | None:
        """The image that a file speaks of; a fault if there is none, or several.

        It is what the name says from the file's own folder, or else the one image in the data
        whose path ends so.

        Args:
            name: the path that is given.
            file: that gives it.
            where: in it.
        """
        name = name.replace("\\", "/")
        if (file.parent / name).is_file():
            return Path(os.path.normpath(file.parent / name))
        parts = Path(name).parts
        same = self.images.get(Path(name).name, [])
        for count in range(len(parts), 0, -1):
            found = [path for path in same if path.parts[-count:] == parts[-count:]]
            if len(found) == 1:
                return found[0]
            if found:
                own = [path for path in found if self.split_of(path) == self.split_of(file)]
                if len(own) == 1:
                    return own[0]
                self.fault(
                    file, where, f"image {name!r} must be one, and is '{found[0]}', '{found[1]}'"
                )
                return None
        self.fault(file, where, f"image {name!r} must be in '{self.folder}', and is not")
        return None

    def split_of(self, file: Path) -> str:
        """The split that a path says, by the last word in it such as train or valid."""
        words = re.split(r"[^a-z]+", str(file.relative_to(self.folder)).lower())
        return next((SPLITS[word] for word in reversed(words) if word in SPLITS), ALL)

    def picture(
        self,
        split: str,
        image: Path,
        file: Path | None = None,
        where: int | str | None = None,
        size: tuple[float, float] | None = None,
    ) -> Picture | None:
        """The picture of an image, which is there once; a fault if it cannot be used.

        Args:
            split: that it belongs to.
            image: its file.
            file: that speaks of it.
            where: in that file.
            size: the width and height that are given there.
        """
        pictures = self.splits.setdefault(split, {})
        if image not in pictures:
            try:
                width, height = image_size(str(image))
            except OSError as error:
                self.faults.append(str(error))
                return None
            pictures[image] = Picture(image, width, height)
        picture = pictures[image]
        if size and tuple(size) != (picture.width, picture.height):
            given = "x".join(f"{side:g}" for side in size)
            self.fault(
                file or image,
                where,
                f"size={given} must be {picture.width}x{picture.height}, that of '{image}'",
            )
            return None
        return picture

    def add(
        self,
        picture: Picture,
        label: str,
        box: Sequence[float] | None,
        file: Path,
        where: int | str | None,
        mask: list[list[float]] | dict[str, Any] | None = None,
        *,
        crowd: bool = False,
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
        """
        width, height = picture.width, picture.height
        if not isinstance(label, str) or not label.strip():
            return self.fault(file, where, f"class {label!r} must be text")
        if isinstance(mask, list) and not (
            mask and all(is_polygon(polygon, width, height) for polygon in mask)
        ):
            return self.fault(
                file,
                where,
                f"polygon must have three points or more in its image of {width}x{height} pixels",
            )
        if box is None:
            xs, ys = ([x for polygon in mask for x in polygon[i::2]] for i in (0, 1))
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        box = tuple(map(float, box))
        inside = clip(list(box), width, height)
        if not (sum(box) == sum(box) and min(box[2:]) > 0 and min(inside[2:]) > 0):
            shown = ", ".join(f"{value:g}" for value in box)
            return self.fault(
                file,
                where,
                f"box=[{shown}] (x, y, width, height) must have an area in its image of "
                f"{width}x{height} pixels",
            )
        picture.things.append(Thing(label.strip(), box, mask, crowd))
        return None

    @property
    def names(self) -> list[str]:
        """Names of the classes: in the order of the format, or else sorted."""
        used = {thing.label for picture in self.pictures for thing in picture.things}
        return self.classes or sorted(used)

    @property
    def pictures(self) -> Iterator[Picture]:
        """Those of all splits."""
        for pictures in self.splits.values():
            yield from pictures.values()

    def coco(self, split: Iterable[Picture]) -> dict[str, list[dict[str, Any]]]:
        """Pictures as a COCO file has them; names of files are relative to the folder.

        Args:
            split: of pictures.
        """
        ids = {name: number for number, name in enumerate(self.names, 1)}
        images, annotations = [], []
        for key, picture in enumerate(split, 1):
            image = {"id": key, "file_name": os.path.relpath(picture.file, self.folder)}
            image |= {"width": picture.width, "height": picture.height}
            images.append(image)
            for thing in picture.things:
                entry = {"id": len(annotations) + 1, "image_id": key, "bbox": [*thing.box]}
                entry |= {"category_id": ids[thing.label], "iscrowd": int(thing.crowd)}
                if thing.mask:
                    entry["segmentation"] = thing.mask
                annotations.append(entry | {"area": area(entry, image)})
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        return {"images": images, "annotations": annotations, "categories": categories}


def numbers(words: Iterable[object]) -> list[float] | None:
    """Words as numbers; None if one is none, or is infinite."""
    try:
        values = [float(word) for word in words]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return values if all(abs(value) < 1e9 for value in values) else None


def are_fractions(values: Iterable[float]) -> bool:
    """Whether values are from 0 to 1, but for rounding."""
    return all(-_CLOSE <= value <= 1 + _CLOSE for value in values)
