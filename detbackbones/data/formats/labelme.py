"""LabelMe: a JSON file of shapes for each image."""

from pathlib import Path

from .findings import Findings, numbers
from .json import kind_of, read_json


def find(folder: Path) -> list[Path]:
    """The JSON files of a folder that have shapes."""
    return [file for file in sorted(folder.rglob("*.json")) if kind_of(file) == "labelme"]


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
        name = content.get("imagePath")
        if not isinstance(name, str) or not name:
            found.fault(file, None, f"imagePath={name!r} must be the path of an image")
            continue
        image = found.locate(name, file)
        size = numbers([content.get("imageWidth"), content.get("imageHeight")])
        if image is None:
            continue
        picture = found.picture(found.split_of(file), image, file, None, size and tuple(size))
        if picture is None:
            continue
        shapes = content["shapes"] if isinstance(content["shapes"], list) else [content["shapes"]]
        for i, shape in enumerate(shapes):
            where = f"shapes[{i}]"
            shape = shape if isinstance(shape, dict) else {}
            kind, points = shape.get("shape_type", "polygon"), shape.get("points")
            flat = None
            if isinstance(points, list) and all(
                isinstance(p, list) and len(p) == 2 for p in points
            ):
                flat = numbers(value for point in points for value in point)
            if kind not in ("polygon", "rectangle"):
                found.fault(file, where, f"shape_type={kind!r} must be 'polygon' or 'rectangle'")
            elif flat is None:
                found.fault(file, where, "points must be a list of pairs of numbers")
            elif kind == "polygon":
                found.add(picture, shape.get("label"), None, file, where, [flat])
            elif len(flat) != 4:
                found.fault(file, where, "points of a rectangle must be two corners")
            else:
                (left, right), (top, bottom) = sorted(flat[::2]), sorted(flat[1::2])
                box = [left, top, right - left, bottom - top]
                found.add(picture, shape.get("label"), box, file, where)
