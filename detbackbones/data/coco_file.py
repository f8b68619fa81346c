"""A user's COCO file: every entry is checked, and what is merely odd is mended and counted."""

import contextlib
import gc
import json
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pycocotools import mask as mask_util

from ..messages import few, first_line

Entry = dict[str, Any]

_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
}
_LARGEST = 1_000_000  # pixels of a side
_NUMBERS = {int, float}  # types: True is none
_LARGEST_ID = 2**53  # pycocotools keeps ids in arrays of float64

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 200
_shorten.maxlist = 12


@dataclass
class CocoFile:
    """The entries of a COCO file, as :func:`read_coco` gives them.

    Attributes:
        path: of the file.
        categories: its categories by id.
        images: its images by id.
        annotations: its annotations, whose ids are 1, 2, ... if they were no different numbers.
        mended: what differs from the file, each a clause such as "3 annotations have no area: ...".
        num_clipped: boxes that stick out of their images; they are as in the file.
        num_flat: boxes without width or height; they are as in the file.
    """

    path: Path
    categories: dict[Any, Entry]
    images: dict[Any, Entry]
    annotations: list[Entry]
    mended: list[str] = field(default_factory=list)
    num_clipped: int = 0
    num_flat: int = 0

    def take_classes(self, names: Sequence[str]) -> None:
        """Leave out all other categories and their annotations.

        Args:
            names: of the categories to keep.
        """
        others = {i for i, category in self.categories.items() if category["name"] not in names}
        if others:
            left = [a for a in self.annotations if a["category_id"] not in others]
            dropped = len(self.annotations) - len(left)
            shown = few([self.categories[i]["name"] for i in sorted(others)])
            self.mended.append(f"the classes {shown} and their {dropped} annotations are left out")
            self.annotations = left
            self.categories = {i: c for i, c in self.categories.items() if i not in others}

    def number_classes(self, names: Sequence[str]) -> None:
        """Give the categories the order of ``names``, and add those that the file does not have.

        Their ids stay as they are if they are in this order and no name is missing.

        Args:
            names: of all categories, in order.
        """
        ids = {category["name"]: i for i, category in self.categories.items()}
        if [ids.get(name) for name in names] == sorted(ids.values()):
            return
        new = {name: number for number, name in enumerate(names, 1)}
        for annotation in self.annotations:
            annotation["category_id"] = new[self.categories[annotation["category_id"]]["name"]]
        self.categories = {number: {"id": number, "name": name} for name, number in new.items()}
        self.mended.append(f"its categories are numbered 1 to {len(names)}, in the order {names}")

    def content(self) -> dict[str, list[Entry]]:
        """What a COCO file of these entries holds."""
        return {
            "categories": list(self.categories.values()),
            "images": list(self.images.values()),
            "annotations": self.annotations,
        }


def read_coco(path: Path, mask_format: str | None = None) -> CocoFile:
    """Read a COCO file and check its entries, one by one.

    pycocotools checks nothing, and its C code writes outside of its memory for masks that are none.

    Args:
        path: of the file; UTF-8, 16 or 32, with or without a byte-order mark.
        mask_format: "polygon" or "bitmask" if every instance needs a mask that is right; with None
            masks that are not are left out, and the boxes stay.

    Raises:
        ValueError: if the file is no COCO file, or an entry is wrong; one sentence that names it.
    """
    content = path.read_bytes()
    encoding = json.detect_encoding(content)
    try:
        with paused_collector():
            data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json_file='{path}' must be JSON: {first_line(error)}") from error
    del content  # large
    sections = [_section(path, data, name) for name in _KEYS]
    coco = CocoFile(
        path,
        _by_id(path, "categories", sections[0]),
        _by_id(path, "images", sections[1]),
        sections[2],
    )
    if encoding != "utf-8":
        coco.mended.append(f"its encoding is {encoding}, where others read UTF-8")
    _check_categories(coco)
    _check_images(coco)
    odd = Counter()
    _number_annotations(coco, odd)
    _check_annotations(coco, mask_format, odd)
    coco.mended += [f"{count} {what}" for what, count in odd.items()]
    return coco


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Python's search for cycles rests, which would go through millions of new objects many times.

    With COCO's file it takes more time than reading; there are no cycles in what is read.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def refuse(path: Path, entry: str, key: str, value: object, must: str) -> NoReturn:
    """Raise the ValueError of a wrong entry.

    Args:
        path: of the file.
        entry: such as "annotation 7" or "images[3]".
        key: of the entry.
        value: that the key has; a long one is shortened.
        must: what the value must be.
    """
    raise ValueError(f"'{path}': {entry}: {key}={_shorten.repr(value)} must {must}")


def _section(path: Path, data: object, name: str) -> list[Entry]:
    entries = data.get(name) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"json_file='{path}' must be a COCO file, with a list {name!r}")
    if not entries:
        hint = ": without, images can be predicted alone, from Python" * (name == "annotations")
        raise ValueError(f"'{path}': {name}=[] must have at least one entry{hint}")
    for i, entry in enumerate(entries):
        for key in _KEYS[name]:
            if not isinstance(entry, dict) or key not in entry:
                raise ValueError(f"'{path}': {name}[{i}] must have {key!r}")
    return entries


def _by_id(path: Path, name: str, entries: list[Entry]) -> dict[Any, Entry]:
    kind = type(entries[0]["id"])
    by_id: dict[Any, Entry] = {}
    for i, entry in enumerate(entries):
        key = entry["id"]
        if kind is str and type(key) is not str:
            refuse(path, f"{name}[{i}]", "id", key, "be text, as the ids before it")
        if kind is not str and (type(key) is not int or abs(key) > _LARGEST_ID):
            refuse(path, f"{name}[{i}]", "id", key, "be a whole number of at most 15 digits")
        if key in by_id:
            raise ValueError(f"'{path}': {name}: id={key!r} must belong to one entry alone")
        by_id[key] = entry
    return by_id


def _check_categories(coco: CocoFile) -> None:
    names: dict[str, Any] = {}
    for key, category in coco.categories.items():
        name = category["name"]
        if not isinstance(name, str) or not name.strip():
            refuse(coco.path, f"category {key}", "name", name, "be text")
        if name in names:
            refuse(coco.path, f"category {key}", "name", name, f"not be that of {names[name]} too")
        names[name] = f"category {key}"


def _check_images(coco: CocoFile) -> None:
    for key, image in coco.images.items():
        for side in ("width", "height"):
            value = image[side]
            if not (type(value) in _NUMBERS and 0 < value <= _LARGEST and value == int(value)):
                must = f"be a whole number of pixels, from 1 to {_LARGEST}"
                refuse(coco.path, f"image {key}", side, value, must)
            image[side] = int(value)
        name = image["file_name"]
        if not isinstance(name, str) or not name or "\0" in name:
            refuse(coco.path, f"image {key}", "file_name", name, "be the path of a file")


def _number_annotations(coco: CocoFile, odd: Counter[str]) -> None:
    """Number the annotations anew unless they have different numbers above 0.

    To pycocotools an annotation of id 0 is never found by a detection, and of two of the same id
    it sees one.
    """
    ids = [annotation.get("id") for annotation in coco.annotations]
    if not (
        set(map(type, ids)) == {int}
        and 0 < min(ids) <= max(ids) <= _LARGEST_ID
        and len(set(ids)) == len(ids)
    ):
        for number, annotation in enumerate(coco.annotations, 1):
            annotation["id"] = number
        odd["annotations have ids that are no different numbers above 0: numbered anew"] = len(ids)


def _check_annotations(coco: CocoFile, mask_format: str | None, odd: Counter[str]) -> None:
    images, categories = coco.images, coco.categories
    image_id_type, category_id_type = type(next(iter(images))), type(next(iter(categories)))
    farthest, crowds = 0.0, 0
    for annotation in coco.annotations:

        def wrong(key: str, must: str, annotation: Entry = annotation) -> NoReturn:
            entry = f"annotation {annotation['id']}"
            refuse(coco.path, entry, key, annotation.get(key), must)

        image_id, category_id = annotation["image_id"], annotation["category_id"]
        if type(image_id) is not image_id_type or image_id not in images:
            wrong("image_id", "be the id of one of the images")
        if type(category_id) is not category_id_type or category_id not in categories:
            wrong("category_id", f"be one of {few(sorted(categories))}")
        if annotation.get("ignore"):
            wrong("ignore", "be left out, for detectron2 has no such key: use iscrowd")
        image, box = images[image_id], annotation["bbox"]
        if not (
            isinstance(box, list)
            and len(box) == 4
            and set(map(type, box)) <= _NUMBERS
            and -_LARGEST <= min(box)
            and max(box) <= _LARGEST
            and sum(box) == sum(box)  # no NaN
        ):
            wrong("bbox", "be [x, y, width, height] in pixels")
        clipped = clip(box, image["width"], image["height"])
        flat = min(box[2:]) == 0 and clipped is box  # COCO itself has two
        coco.num_flat += flat
        if min(clipped[2:]) <= 0 and not flat:
            size = f"{image['width']}x{image['height']}"
            wrong("bbox", f"have an area inside its image, '{image['file_name']}' of {size} pixels")
        coco.num_clipped += clipped is not box
        farthest = max(farthest, box[0] + box[2], box[1] + box[3])

        if "iscrowd" not in annotation:
            odd["annotations have no iscrowd: it is 0"] += 1
            annotation["iscrowd"] = 0
        elif annotation["iscrowd"] not in (0, 1) or isinstance(annotation["iscrowd"], float):
            wrong("iscrowd", "be 0 or 1")
        crowds += annotation["iscrowd"]
        if mask_format or annotation.get("segmentation") is not None:
            _check_mask(annotation, image, mask_format, odd, wrong)
        size = annotation.get("area", 0)
        if not (type(size) in _NUMBERS and 0 <= size <= _LARGEST**2):
            wrong("area", "be a number of pixels, from 0")
        if "area" not in annotation:
            odd["annotations have no area: computed"] += 1
            annotation["area"] = area(annotation, image)
        keypoints = annotation.get("keypoints") or []
        if not isinstance(keypoints, list) or not set(map(type, keypoints)) <= _NUMBERS:
            wrong("keypoints", "be a list of numbers")
    if crowds == len(coco.annotations):
        refuse(coco.path, "annotations", "iscrowd", 1, "be 0 in at least one of them")
    if farthest <= 1 and max(max(i["width"], i["height"]) for i in images.values()) > 2:
        first = coco.annotations[0]
        must = "be in pixels, and no box of the file reaches beyond the first: are they fractions?"
        refuse(coco.path, f"annotation {first['id']}", "bbox", first["bbox"], must)


def _check_mask(
    annotation: Entry, image: Entry, mask_format: str | None, odd: Counter[str], wrong: Any
) -> None:
    """Check a mask; without ``mask_format``, leave out one that is wrong."""
    mask, width, height = annotation.get("segmentation"), image["width"], image["height"]
    if isinstance(mask, dict):
        right = is_rle(mask, width, height)
        must = f"be RLE of size [{height}, {width}], whose counts add up to {height * width}"
    else:
        polygons = mask if isinstance(mask, list) else []
        good = [p for p in polygons if is_polygon(p, width, height)]
        if mask_format and good and all(p in good or _is_short(p) for p in polygons):
            if len(good) < len(polygons):
                odd["polygons have less than three points: left out"] += len(polygons) - len(good)
                annotation["segmentation"] = mask = good
            polygons = good
        right = bool(good) and len(good) == len(polygons)
        must = "be a mask: the model needs instance masks"
        if polygons:
            must = "be polygons [[x, y, x, y, x, y, ...], ...] of three points or more, in pixels"
    if mask_format is None and not right:
        odd["annotations have a segmentation that is no mask: their boxes stay"] += 1
        del annotation["segmentation"]
    elif not right:
        wrong("segmentation", must)
    elif mask_format == "polygon" and isinstance(mask, dict) and not annotation["iscrowd"]:
        must = "be polygons: for RLE set dataloader.train.mapper.instance_mask_format=bitmask"
        wrong("segmentation", must)


def _is_short(polygon: object) -> bool:
    return isinstance(polygon, list) and len(polygon) < 6 and set(map(type, polygon)) <= _NUMBERS


def is_polygon(points: object, width: float, height: float) -> bool:
    """Whether it is ``[x, y, x, y, ...]`` of three points or more in or near an image.

    A point may lie outside of the image by its width and height.
    """
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    if not set(map(type, points)) <= _NUMBERS:
        return False
    xs, ys = points[::2], points[1::2]
    inside = -width <= min(xs) and max(xs) <= 2 * width
    return inside and -height <= min(ys) and max(ys) <= 2 * height and sum(points) == sum(points)


def is_rle(mask: Mapping[str, Any], width: int, height: int) -> bool:
    """Whether it is COCO's RLE, compressed or not, of an image's size."""
    counts = mask.get("counts")
    size = mask.get("size")
    if size != [height, width] or set(map(type, size)) != {int}:
        return False
    if isinstance(counts, str):
        counts = _decoded(counts)
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        return False
    return bool(counts) and min(counts) >= 0 and sum(counts) == height * width


def _decoded(text: str) -> list[int]:
    """The counts of compressed RLE, as ``rleFrString`` of pycocotools reads them; [] if wrong.

    Each is written in groups of 5 bits, the lowest first, with a sixth where another follows, and
    from the fourth on as the difference to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return [] if shift else counts


def area(annotation: Entry, image: Entry) -> float:
    """The area of an annotation's mask, or else of its box, in pixels."""
    mask = annotation.get("segmentation")
    if not mask:
        return annotation["bbox"][2] * annotation["bbox"][3]
    size = int(image["height"]), int(image["width"])
    rle = mask if isinstance(mask, dict) and isinstance(mask["counts"], str) else None
    rle = rle or mask_util.frPyObjects(mask, *size)
    return float(mask_util.area(mask_util.merge(rle) if isinstance(rle, list) else rle))


def clip(box: list[float], width: float, height: float) -> list[float]:
    """Clip a box to its image.

    Args:
        box: ``[x, y, width, height]`` in pixels.
        width: of the image.
        height: of the image.

    Returns:
        a box inside the image; the box itself, free of rounding, if it is inside.
    """
    x, y, w, h = box
    if x >= 0 and y >= 0 and x + w <= width and y + h <= height:
        return box
    left, top = max(x, 0), max(y, 0)
    return [left, top, min(x + w, width) - left, min(y + h, height) - top]
