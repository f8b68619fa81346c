"""LabelMe: a JSON file of shapes for each image."""

from pathlib import Path
from typing import Any

from .findings import Findings, Picture, numbers, pairs
from .json import files_of, read_json


def find(found: Findings) -> list[Path]:
    """The JSON files of a folder that have shapes."""
    return files_of("labelme", found)


def read(files: list[Path], found: Findings) -> None:
    """Read data sets; polygons of one group and class are one object, as in LabelMe's own programs.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    for file in files:
        content = read_json(file, found)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            if content is not None:
                found.fault(file, None, "it must have a list of shapes")
            continue
        name = content.get("imagePath")
        if not isinstance(name, str) or not name:
            found.fault(file, None, f"imagePath={name!r} must be the path of an image")
            continue
        image = found.locate(name, file)
        size = numbers([content.get("imageWidth"), content.get("imageHeight")])
        picture = image and found.picture(found.split_of(file), image, file, None, size)
        if picture:
            _read_shapes(content["shapes"], picture, file, found)


def _read_shapes(shapes: list[Any], picture: Picture, file: Path, found: Findings) -> None:
    groups: dict[tuple, list[list[float]]] = {}
    for i, shape in enumerate(shapes):
        where = f"shapes[{i}]"
        shape = shape if isinstance(shape, dict) else {}
        kind, label = shape.get("shape_type", "polygon"), shape.get("label")
        points = pairs(shape.get("points"))
        if kind not in ("polygon", "rectangle"):
            found.fault(file, where, f"shape_type={kind!r} must be 'polygon' or 'rectangle'")
        elif points is None:
            found.fault(file, where, "points must be a list of pairs of numbers")
        elif kind == "rectangle":
            xs, ys = points[::2], points[1::2]
            if len(xs) not in (2, 4):
                found.fault(file, where, "points of a rectangle must be two or four corners")
                continue
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            found.add(picture, label, box, file, where)
        elif isinstance(shape.get("group_id"), int) and isinstance(label, str):
            groups.setdefault((shape["group_id"], label), []).append(points)
        else:
            found.add(picture, label, None, file, where, [points])
    for (group, label), polygons in groups.items():
        found.add(picture, label, None, file, f"group_id {group}", polygons)
