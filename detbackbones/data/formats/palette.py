"""Files that say what the values or the colours of label maps mean."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from ...messages import first_line

# The name of the class of a value, or of a colour as red * 65536 + green * 256 + blue.
Meanings = dict[int, str]

NAMES = ("classes.txt", "labels.txt", "names.txt", "class_names.txt")  # a name a line, from 0
_CVAT = "labelmap.txt"  # CVAT's "Segmentation mask"
_CLASS = ("name", "class", "label", "class name", "category")
_CHANNELS = (("r", "g", "b"), ("red", "green", "blue"))
_VALUE = ("pixel value", "value", "id", "index")  # Roboflow's _classes.csv has the first
_CVAT_LINE = re.compile(r"([^:#]+):(\d+),(\d+),(\d+):")


def find_palettes(files: Iterable[Path]) -> list[Path]:
    """The files that :func:`read_palette` reads."""
    names = (_CVAT, *NAMES)
    return [x for x in files if x.name.lower() in names or x.suffix == ".csv" and _columns(x)]


def color_of(red: int, green: int, blue: int) -> int:
    """A colour as one number."""
    return red * 65536 + green * 256 + blue


def read_palette(file: Path) -> tuple[Meanings, bool]:
    """What a file says.

    It is a CSV file with a column of names and one of values or three of colours, CVAT's
    ``labelmap.txt``, or a text file of a name a line for the values 0, 1, 2 and so on.

    Args:
        file: to read.

    Returns:
        the meanings, in the order of the file, and whether they are of colours.

    Raises:
        ValueError: if a line is wrong, by its number, or the file cannot be read.
    """
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"'{file}': it cannot be read: {first_line(error)}") from error
    lines = text.splitlines()
    rows: list[tuple[int, str, list[str]]] = []  # line, name, one value or three
    if file.suffix.lower() == ".csv":
        columns = _columns(file)
        if columns is None:
            raise ValueError(f"'{file}': its first line must name columns such as name, r, g, b")
        for number, row in enumerate(csv.reader(lines[1:], skipinitialspace=True), 2):
            if row:
                row += [""] * (max(columns) + 1 - len(row))
                rows.append((number, row[columns[0]], [row[i] for i in columns[1:]]))
    elif any(_CVAT_LINE.match(line) for line in lines):
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                name, *color = found.groups() if (found := _CVAT_LINE.match(line)) else (line,)
                rows.append((number, name, color))
    else:
        names = [line for line in lines if line.strip()]
        rows = [(number, name, [str(number - 1)]) for number, name in enumerate(names, 1)]
    meanings: Meanings = {}
    for number, name, words in rows:
        if not (name.strip() and words and all(w.strip().isdecimal() for w in words)):
            raise ValueError(f"'{file}': line {number}: it must have a name and whole numbers")
        values = [int(word) for word in words]
        if max(values) > (255 if len(values) == 3 else 65535):
            raise ValueError(f"'{file}': line {number}: {max(values)} is too large")
        key = color_of(*values) if len(values) == 3 else values[0]
        if key in meanings:
            raise ValueError(f"'{file}': line {number}: {', '.join(words)} is there twice")
        meanings[key] = name.strip()
    if not meanings:
        raise ValueError(f"'{file}': it must name classes, and names none")
    return meanings, len(rows[0][2]) == 3


def _columns(file: Path) -> list[int] | None:
    """Which columns of a CSV file are the name, and the value or the three of a colour."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            names = [name.strip().lower() for name in next(csv.reader(lines), [])]
    except (OSError, ValueError, csv.Error):
        return None
    label = next((name for name in _CLASS if name in names), None)
    wanted = [*_CHANNELS, *((name,) for name in _VALUE)]
    values = next((some for some in wanted if {*some} <= {*names}), None)
    return [names.index(name) for name in (label, *values)] if label and values else None
