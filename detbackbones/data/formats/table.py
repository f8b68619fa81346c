"""A CSV file of boxes, a row each."""

import csv
from itertools import islice
from pathlib import Path

from .findings import SPLITS, Findings, are_fractions, numbers

_IMAGE = ("filename", "file_name", "image", "image_path", "image_name", "path", "file")
_LABEL = ("class_name", "class", "label", "category", "category_name", "name")
_SPLIT = ("split", "set", "subset")
_CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
)
_SIZES = (("x", "y", "w", "h"), ("x", "y", "width", "height"), ("left", "top", "width", "height"))
_BARE = ("path", "x1", "y1", "x2", "y2", "class")  # of a file without a first row of names


def find(folder: Path) -> list[Path]:
    """The CSV files of a folder that have columns of boxes."""
    return [file for file in sorted(folder.rglob("*.csv")) if _columns(file)]


def read(files: list[Path], found: Findings) -> None:
    """Read data sets.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    for file in files:
        columns, bare = _columns(file)
        image_key, label_key, split_key, place, corners = _meaning(columns)
        with file.open(newline="", encoding="utf-8-sig") as content:
            rows = csv.DictReader(content, columns, skipinitialspace=True)
            for row in islice(rows, 0 if bare else 1, None):
                line = rows.line_num
                if None in row or None in row.values():
                    found.fault(file, line, f"it must have {len(columns)} fields, as the first row")
                    continue
                image = found.locate(row[image_key], file, line)
                if image is None:
                    continue
                split = found.split_of(file)
                if split_key:
                    split = SPLITS.get(row[split_key].strip().lower(), split)
                picture = found.picture(split, image, file, line)
                words = [row[key].strip() for key in place]
                if picture is None or not any(words):  # an image without objects
                    continue
                values = numbers(words)
                if values is None:
                    found.fault(file, line, f"{', '.join(place)}={words} must be numbers")
                elif are_fractions(values):
                    found.fault(
                        file,
                        line,
                        f"{', '.join(place)}={words} must be in pixels: are they fractions?",
                    )
                else:
                    left, top, *end = values
                    box = [left, top, *end]
                    if corners:
                        box[2:] = end[0] - left, end[1] - top
                    found.add(picture, row[label_key], box, file, line)


def _columns(file: Path) -> tuple[list[str], bool] | None:
    """The names of the columns, and whether no row has them; None if there are no boxes."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as content:
            first = next(csv.reader(content, skipinitialspace=True), [])
    except (UnicodeDecodeError, csv.Error):
        return None
    names = [word.strip().lower() for word in first]
    if _meaning(names):
        return names, False
    if len(first) == len(_BARE) and (numbers(first[1:5]) or not any(first[1:])):
        return [*_BARE], True
    return None


def _meaning(names: list[str]) -> tuple[str, str, str | None, tuple[str, ...], bool] | None:
    """The columns of image, class, split and box, and whether the box is two corners."""

    def first(keys: tuple[str, ...]) -> str | None:
        return next((key for key in keys if key in names), None)

    corners = next((keys for keys in _CORNERS if set(keys) <= set(names)), None)
    place = corners or next((keys for keys in _SIZES if set(keys) <= set(names)), None)
    image, label = first(_IMAGE), first(_LABEL)
    if not (place and image and label):
        return None
    return image, label, first(_SPLIT), place, bool(corners)
