"""A CSV file of boxes, a row each."""

import csv
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ...messages import first_line
from .findings import SPLITS, Findings, Picture, are_fractions, numbers

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
_BARE = ["path", "x1", "y1", "x2", "y2", "class"]  # of a file without a first row of names


class Columns(NamedTuple):
    """What the columns of a file are.

    Attributes:
        names: of all.
        image, label, split: names of those; the last may not be there.
        place: of the box.
        corners: whether the box is two corners, or else has a width and a height.
        bare: whether the file has no first row of names.
        delimiter: between fields.
    """

    names: list[str]
    image: str
    label: str
    split: str | None
    place: tuple[str, ...]
    corners: bool
    bare: bool
    delimiter: str


def find(found: Findings) -> list[Path]:
    """The CSV files of a folder that have columns of boxes."""
    return [file for file in found.files if file.suffix.lower() == ".csv" and _columns(file)]


def read(files: list[Path], found: Findings) -> None:
    """Read data sets.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    for file in files:
        columns = _columns(file)
        line = 1
        try:
            with file.open(newline="", encoding="utf-8-sig") as content:
                rows = csv.DictReader(
                    content,
                    columns.names,
                    delimiter=columns.delimiter,
                    skipinitialspace=True,
                    strict=True,
                )
                for row in islice(rows, 0 if columns.bare else 1, None):
                    line = rows.line_num
                    _read_row(row, columns, file, line, found)
        except (csv.Error, UnicodeDecodeError) as error:
            found.fault(file, line + 1, f"it must be UTF-8 CSV: {first_line(error)}")


def _read_row(row: dict, columns: Columns, file: Path, line: int, found: Findings) -> None:
    if None in row or None in row.values():
        found.fault(file, line, f"it must have {len(columns.names)} fields, as the first row")
        return
    image = found.locate(row[columns.image], file, line)
    if image is None:
        return
    split = found.split_of(file)
    if columns.split:
        word = row[columns.split].strip().lower()
        if word not in SPLITS:
            found.fault(file, line, f"{columns.split}={word!r} must be train, val or test")
            return
        split = SPLITS[word]
    size = None
    if columns.corners and {"width", "height"} <= set(columns.names):
        size = numbers([row["width"], row["height"]])
    picture = found.picture(split, image, file, line, size, rows=True)
    words = [row[key].strip() for key in columns.place]
    if picture is None or not any(words):  # an image without objects
        return
    _read_box(picture, row[columns.label], words, columns, file, line, found)


def _read_box(
    picture: Picture,
    label: str,
    words: list[str],
    columns: Columns,
    file: Path,
    line: int,
    found: Findings,
) -> None:
    shown = f"{', '.join(columns.place)}={words}"
    values = numbers(words)
    if values is None:
        found.fault(file, line, f"{shown} must be numbers")
    elif are_fractions(values):
        found.fault(file, line, f"{shown} must be in pixels: are they fractions?")
    else:
        left, top, *end = values
        box = [left, top, end[0] - left, end[1] - top] if columns.corners else values
        found.add(picture, label, box, file, line)


def _columns(file: Path) -> Columns | None:
    """What the columns are; None if they are not of boxes."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as content:
            head = content.readline()
    except UnicodeDecodeError:
        return None
    delimiter = ";" if head.count(";") > head.count(",") else ","
    first = next(csv.reader([head], delimiter=delimiter, skipinitialspace=True), [])
    names = [word.strip().lower() for word in first]
    bare = len(first) == len(_BARE) and bool(numbers(first[1:5]) or not any(first[1:]))
    names = _BARE if bare else names

    def named(keys: tuple[str, ...]) -> str | None:
        return next((key for key in keys if key in names), None)

    corners = next((keys for keys in _CORNERS if set(keys) <= set(names)), None)
    place = corners or next((keys for keys in _SIZES if set(keys) <= set(names)), None)
    image, label = named(_IMAGE), named(_LABEL)
    if not (place and image and label):
        return None
    return Columns(names, image, label, named(_SPLIT), place, bool(corners), bare, delimiter)
