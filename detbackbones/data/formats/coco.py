"""COCO's format for instances: a JSON file for each split."""

from pathlib import Path
from typing import Any

from ..coco_file import is_rle
from .findings import Findings, numbers
from .json import kind_of, read_json

_KEYS = ("images", "annotations", "categories")


def find(folder: Path) -> list[Path]:
    """The JSON files of a folder that have images, annotations and categories."""
    return [file for file in sorted(folder.rglob("*.json")) if kind_of(file) == "coco"]


def read(files: list[Path], found: Findings) -> None:
    """Read data sets.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    for file in files:
        content = read_json(file, found)
        if content is None:
            continue
        if not isinstance(content, dict) or not all(
            isinstance(content.get(key), list)
            and all(isinstance(entry, dict) for entry in content[key])
            for key in _KEYS
        ):
            found.fault(file, None, f"it must have lists of entries: {', '.join(_KEYS)}")
            continue
        _read(file, content, found)


def _read(file: Path, content: dict[str, list[dict[str, Any]]], found: Findings) -> None:
    names = _names(file, content["categories"], found)
    used = {
        entry.get("category_id")
        for entry in content["annotations"]
        if _is_key(entry.get("category_id"))
    }
    for key in sorted(names, key=str):
        # Roboflow's first category is the name of the project, and has no annotations
        if names[key] not in found.classes and (key in used or key != 0):
            found.classes.append(names[key])
    pictures = {}
    for i, entry in enumerate(content["images"]):
        key, name = entry.get("id"), entry.get("file_name")
        where = f"images[{i}]"
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
            split = found.split_of(file)
            pictures[key] = found.picture(split, image, file, where, size and (size[0], size[1]))
    for i, entry in enumerate(content["annotations"]):
        where = f"annotation {entry['id']}" if _is_key(entry.get("id")) else f"annotations[{i}]"
        image_id, category_id = entry.get("image_id"), entry.get("category_id")
        if not _is_key(image_id) or image_id not in pictures:
            found.fault(file, where, f"image_id={image_id!r} must be the id of one of the images")
        elif not _is_key(category_id) or category_id not in names:
            found.fault(
                file, where, f"category_id={category_id!r} must be one of {sorted(names, key=str)}"
            )
        elif picture := pictures[image_id]:
            box = entry.get("bbox")
            box = numbers(box) if isinstance(box, list) and len(box) == 4 else None
            mask = entry.get("segmentation") or None
            if isinstance(mask, list):  # COCO itself has polygons of two points beside others
                mask = [p for p in mask if not isinstance(p, list) or len(p) >= 6] or mask
            if isinstance(mask, dict) and not is_rle(mask, picture.width, picture.height):
                found.fault(file, where, "segmentation must be RLE of its image's size")
            elif box is None:
                found.fault(file, where, "bbox must be [x, y, width, height] in pixels")
            else:
                crowd = entry.get("iscrowd") == 1
                found.add(picture, names[category_id], box, file, where, mask, crowd=crowd)


def _names(file: Path, categories: list[dict[str, Any]], found: Findings) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for i, entry in enumerate(categories):
        key, name = entry.get("id"), entry.get("name")
        if not _is_key(key) or key in names:
            found.fault(
                file, f"categories[{i}]", f"id={key!r} must be a number or text of one category"
            )
        elif not isinstance(name, str) or not name.strip() or name in names.values():
            found.fault(file, f"categories[{i}]", f"name={name!r} must be text of one category")
        else:
            names[key] = name.strip()
    return names


def _is_key(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
