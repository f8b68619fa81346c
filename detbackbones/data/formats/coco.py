"""COCO's format for instances: a JSON file for each split."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...messages import few
from ..coco_file import is_rle
from .findings import Findings, Picture, numbers
from .json import files_of, read_json

_KEYS = ("images", "annotations", "categories")
Entry = dict[str, Any]


def find(found: Findings) -> list[Path]:
    """The JSON files of a folder that have images and annotations."""
    return files_of("coco", found)


def read(files: list[Path], found: Findings) -> None:
    """Read data sets.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    contents: list[tuple[Path, Entry]] = []
    for file in files:
        content = read_json(file, found)
        if isinstance(content, dict) and "categories" not in content:  # captions, or results
            found.notes.append(f"'{file}' has no categories: it is left out")
        elif isinstance(content, dict) and all(_is_entries(content.get(key)) for key in _KEYS):
            contents.append((file, content))
        elif content is not None:
            found.fault(file, None, f"it must have lists of entries: {', '.join(_KEYS)}")
    # Roboflow's first category is the name of the project, of which nothing is
    used = {str(x.get("category_id")) for _, content in contents for x in content["annotations"]}
    names: dict[Any, str] = {}
    for file, content in contents:
        names |= _names(file, content["categories"], found)
    for key in _sorted(names):
        if names[key] not in found.classes and (key != 0 or "0" in used):
            found.classes.append(names[key])
    flat = keypoints = 0
    for file, content in contents:
        pictures = _pictures(file, content["images"], found)
        names = _names(file, content["categories"], found=None)
        for i, entry in enumerate(content["annotations"]):
            where = f"annotation {entry['id']}" if _is_key(entry.get("id")) else f"annotations[{i}]"
            keypoints += bool(entry.get("keypoints"))
            flat += _read_annotation(entry, where, names, pictures, file, found)
    if flat:
        found.notes.append(f"{flat} boxes have no width or height: they are left out")
    if keypoints:
        found.notes.append(f"the keypoints of {keypoints} objects are left out")


def _pictures(file: Path, entries: list[Entry], found: Findings) -> dict[Any, Picture | None]:
    pictures: dict[Any, Picture | None] = {}
    for i, entry in enumerate(entries):
        key, name, where = entry.get("id"), entry.get("file_name"), f"images[{i}]"
        if not _is_key(key) or key in pictures:
            found.fault(file, where, f"id={key!r} must be a number or text of one image alone")
            continue
        pictures[key] = None
        if not isinstance(name, str) or not name:
            found.fault(file, where, f"file_name={name!r} must be the path of an image")
            continue
        image = found.locate(name, file, where)
        size = numbers([entry.get("width"), entry.get("height")])
        if image:
            pictures[key] = found.picture(found.split_of(file), image, file, where, size)
    return pictures


def _read_annotation(
    entry: Entry,
    where: str,
    names: dict[Any, str],
    pictures: dict[Any, Picture | None],
    file: Path,
    found: Findings,
) -> bool:
    """Read an object; whether it is left out since its box has no width or height."""
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if not _is_key(image_id) or image_id not in pictures:
        found.fault(file, where, f"image_id={image_id!r} must be the id of one of the images")
        return False
    if not _is_key(category_id) or category_id not in names:
        found.fault(
            file, where, f"category_id={category_id!r} must be one of {few(_sorted(names))}"
        )
        return False
    picture = pictures[image_id]
    if picture is None:
        return False
    box, mask = entry.get("bbox"), entry.get("segmentation") or None
    box = numbers(box) if isinstance(box, list) and len(box) == 4 else None
    if isinstance(mask, list):  # COCO itself has polygons of two points beside others
        mask = [p for p in mask if not isinstance(p, list) or len(p) >= 6] or mask
    if entry.get("ignore"):
        found.fault(file, where, "ignore must be left out: use iscrowd")
    elif box is None:
        found.fault(file, where, "bbox must be [x, y, width, height] in pixels")
    elif (
        mask is not None
        and not isinstance(mask, list)
        and not (isinstance(mask, dict) and is_rle(mask, picture.width, picture.height))
    ):
        found.fault(file, where, "segmentation must be polygons, or RLE of its image's size")
    elif min(box[2:]) == 0 and max(box[2:]) >= 0:
        return True
    else:
        size = numbers([entry.get("area")])
        found.add(
            *(picture, names[category_id], box, file, where, mask),
            crowd=entry.get("iscrowd") == 1,
            size=size[0] if size else None,
        )
    return False


def _names(file: Path, categories: list[Entry], found: Findings | None) -> dict[Any, str]:
    """The names of categories by their ids; faults if they are to be found."""
    names: dict[Any, str] = {}
    for i, entry in enumerate(categories):
        key, name = entry.get("id"), entry.get("name")
        wrong = ""
        if not _is_key(key) or key in names:
            wrong = f"id={key!r} must be a number or text of one category"
        elif not isinstance(name, str) or not name.strip() or name in names.values():
            wrong = f"name={name!r} must be text of one category"
        else:
            names[key] = name.strip()
        if wrong and found:
            found.fault(file, f"categories[{i}]", wrong)
    return names


def _sorted(keys: Iterable[Any]) -> list[Any]:
    return sorted(keys, key=lambda key: (isinstance(key, str), key))


def _is_entries(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _is_key(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
